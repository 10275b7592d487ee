//! What readers are told.

use super::*;

#[test]
fn rows_60_to_62_reads_of_what_is_not_there() {
    let mut cluster = Cluster::new(2, &["ab"]);
    let read = |cluster: &Cluster, request: ReadRequest| cluster.ledger.check_read(&request);
    let all = ReadRequest::default();
    assert_eq!(read(&cluster, all), Err(Error::Empty));
    cluster.append(1, 128).unwrap();
    assert_eq!(read(&cluster, all), Ok(Read { generation: 0, at_len: 128 }));
    let at = |at_len| ReadRequest { at_len: Some(at_len), ..all };
    assert_eq!(read(&cluster, at(96)), Ok(Read { generation: 0, at_len: 96 }));
    assert_eq!(read(&cluster, at(200)).unwrap_err().to_string(), "200 > 128");
    assert_eq!(read(&cluster, at(0)), Err(Error::Empty));
    let behind = ReadRequest { min_len: 130, ..all };
    assert_eq!(read(&cluster, behind).unwrap_err().to_string(), "committed 128, min_len 130");
    for seq in 2..=5 {
        cluster.op(seq, TRUNCATE).unwrap();
    }
    let old = ReadRequest { generation: Some(3), ..all };
    assert_eq!(read(&cluster, old).unwrap_err().to_string(), "session 4, request 3");
    // Whoever was told of more tokens before a cut isn't behind for that; of a generation that never was, nobody was told.
    let len = cluster.ledger.tokens()[0];
    let cut = ReadRequest { min_len: 128, min_len_generation: 3, ..all };
    assert_eq!(read(&cluster, cut), Ok(Read { generation: 4, at_len: len }));
    let behind = ReadRequest { min_len_generation: 4, ..cut };
    assert_eq!(read(&cluster, behind).unwrap_err().to_string(), format!("committed {len}, min_len 128"));
    let other = ReadRequest { min_len_generation: 5, ..all };
    assert_eq!(read(&cluster, other).unwrap_err().to_string(), "session 4, request 5");
    // A step looks at what it appends, before that has happened.
    cluster.silent = vec![holder("b")];
    let Ok(Begun::Started(op)) = cluster.append(6, 2) else { panic!("it doesn't begin") };
    assert_eq!(read(&cluster, all), Ok(Read { generation: 4, at_len: 10 }));
    let step = ReadRequest { after: Some(op), ..all };
    assert_eq!(read(&cluster, step), Ok(Read { generation: 4, at_len: 12 }));
}
