//! Reads messages as prost does, and counts first what they have of messages inside of messages.
//!
//! An entry of a repeated field takes two bytes on the wire and dozens in memory. Where messages are large because they have tensors in
//! them, and have such fields too, a count that comes after they were decoded comes too late: 8 MiB of empty steps would take hundreds of
//! MiB. So the bytes are walked once, without anything being made of them; tensors are stepped over.

use std::marker::PhantomData;

use bytes::Buf as _;
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::error::Error;
use crate::{convert, proto};

/// A message, and which lists in it are counted before it is decoded.
pub trait Counted {
    /// Of a field that is a message, and of a repeated field in that one: their numbers, and what to call the entries.
    const LISTS: &'static [(u32, u32, &'static str)] = &[];
}

impl Counted for proto::AttendRequest {}
impl Counted for proto::AttendReply {}
impl Counted for proto::StatusRequest {}
impl Counted for proto::StatusReply {}
impl Counted for proto::JoinRequest {}
impl Counted for proto::JoinReply {}
impl Counted for proto::ComputeRequest {}
impl Counted for proto::ComputeReply {}

impl Counted for proto::SessionRequest {
    const LISTS: &'static [(u32, u32, &'static str)] = &[(4, 1, "steps")];
}

impl Counted for proto::SessionReply {
    const LISTS: &'static [(u32, u32, &'static str)] =
        &[(3, 9, "shards"), (4, 1, "results"), (6, 1, "names")];
}

impl Counted for proto::HoldRequest {
    const LISTS: &'static [(u32, u32, &'static str)] = &[(3, 3, "pieces"), (4, 1, "works")];
}

impl Counted for proto::HoldReply {
    const LISTS: &'static [(u32, u32, &'static str)] = &[(3, 1, "results")];
}

/// The codec of all services.
#[derive(Debug)]
pub struct CountingCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for CountingCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for CountingCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Counted + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = CountingDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        CountingDecoder(ProstCodec::<T, U>::default().decoder())
    }
}

/// Counts, then decodes.
#[derive(Debug)]
pub struct CountingDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default + Counted> Decoder for CountingDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // The buffer is in one piece; were it not, what is behind the first one would be left to the decoder.
        check(buf.chunk(), U::LISTS)?;
        self.0.decode(buf)
    }
}

/// Refuses a message with too long a list.
///
/// # Errors
/// [`crate::Reason::Count`]. A message that can't be read is for the decoder to refuse.
fn check(message: &[u8], lists: &[(u32, u32, &str)]) -> Result<(), Error> {
    if lists.is_empty() {
        return Ok(());
    }
    let mut counts = vec![0; lists.len()];
    for_each_message(message, |outer, inside| {
        // A field that comes again is merged into the first one, so its entries are added.
        for ((_, inner, _), count) in lists.iter().zip(&mut counts).filter(|((field, ..), _)| *field == outer)
        {
            for_each_message(inside, |field, _entry| *count += usize::from(field == *inner));
        }
    });
    lists.iter().zip(&counts).try_for_each(|((.., name), count)| convert::count(name, *count))
}

/// Calls `each` with the number and the bytes of every field that has a length, until what can't be read.
fn for_each_message(mut message: &[u8], mut each: impl FnMut(u32, &[u8])) {
    while let Ok((field, wire_type)) = decode_key(&mut message) {
        if wire_type != WireType::LengthDelimited {
            if skip_field(wire_type, field, &mut message, DecodeContext::default()).is_err() {
                return;
            }
            continue;
        }
        let Ok(len) = decode_varint(&mut message) else { return };
        let split = usize::try_from(len).ok().and_then(|len| message.split_at_checked(len));
        let Some((inside, behind)) = split else { return };
        each(field, inside);
        message = behind;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused<M: Message + Counted>(message: &M) -> Option<String> {
        check(&message.encode_to_vec(), M::LISTS).err().map(|error| error.message())
    }

    fn steps(n: usize) -> proto::SessionRequest {
        let steps = proto::SessionSteps { steps: vec![proto::Step::default(); n] };
        proto::SessionRequest {
            request: 1,
            timeout_ms: 9,
            ask: Some(proto::session_request::Ask::Steps(steps)),
        }
    }

    #[test]
    fn lists_are_counted_in_the_fields_that_they_are_in() {
        assert_eq!(refused(&steps(1024)), None);
        assert_eq!(refused(&steps(32_768)).as_deref(), Some("COUNT: steps 32768 > 1024"));
        let works = proto::ShardWorks { works: vec![proto::ShardWork::default(); 1025] };
        let ask = Some(proto::hold_request::Ask::Works(works));
        let works = proto::HoldRequest { request: 1, term: 1, ask };
        assert_eq!(refused(&works).as_deref(), Some("COUNT: works 1025 > 1024"));
        let pieces = vec![proto::Piece::default(); 1025];
        let hold = proto::HoldShard { pieces, ..Default::default() };
        let hold =
            proto::HoldRequest { request: 1, term: 1, ask: Some(proto::hold_request::Ask::Hold(hold)) };
        assert_eq!(refused(&hold).as_deref(), Some("COUNT: pieces 1025 > 1024"));
        let results = proto::ShardResults { results: vec![proto::ShardResult::default(); 1025] };
        let answer = Some(proto::hold_reply::Answer::Results(results));
        let results = proto::HoldReply { answer, ..Default::default() };
        assert_eq!(refused(&results).as_deref(), Some("COUNT: results 1025 > 1024"));
        let answers = [
            proto::session_reply::Answer::Steps(proto::StepResults {
                results: vec![Default::default(); 1025],
            }),
            proto::session_reply::Answer::Names(proto::SessionNames { names: vec![String::new(); 1025] }),
            proto::session_reply::Answer::Description(proto::SessionDescription {
                shards: vec![Default::default(); 1025],
                ..Default::default()
            }),
        ];
        for (answer, name) in answers.into_iter().zip(["results", "names", "shards"]) {
            let reply = proto::SessionReply { answer: Some(answer), ..Default::default() };
            assert_eq!(refused(&reply), Some(format!("COUNT: {name} 1025 > 1024")));
        }
    }

    #[test]
    fn a_field_that_comes_again_adds_to_the_first() {
        let half = steps(600).encode_to_vec();
        let twice = [half.as_slice(), half.as_slice()].concat();
        let error = check(&twice, proto::SessionRequest::LISTS).unwrap_err();
        assert_eq!(error.message(), "COUNT: steps 1200 > 1024");
    }

    #[test]
    fn bytes_of_tensors_are_no_entries() {
        let chunk = proto::TensorChunk { data: vec![10; 1 << 20].into(), ..Default::default() };
        let ask = Some(proto::session_request::Ask::Chunk(chunk));
        assert_eq!(refused(&proto::SessionRequest { ask, ..Default::default() }), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_is_counted_is_what_is_decoded(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), n in 1000..1050_usize, cut in 0..3_usize,
        ) {
            let _either = check(&bytes, proto::SessionReply::LISTS);
            let mut message = steps(n).encode_to_vec();
            message.truncate(message.len() - cut);
            let is_decoded = proto::SessionRequest::decode(&message[..]).is_ok();
            prop_assert!(!is_decoded || check(&message, proto::SessionRequest::LISTS).is_ok() == (n <= 1024));
        }
    }
}
