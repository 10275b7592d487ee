//! What travels beside Q, K and V on its way to one worker: the bytes of its parts, gathered from a chunk of the
//! client.

use attnd_plan::{Gathered, SideTensor};
use attnd_wire::{SliceChunk, limits};
use bytes::{Bytes, BytesMut};

use super::outgoing::Outgoing;

impl Outgoing {
    /// Puts what of `data` belongs to a part into messages, and counts them as sent. Where it is one run, they share
    /// the bytes of the client's message; short runs are copied together, because a message each would cost far more.
    pub(super) fn cut_side(
        &mut self,
        tensor: SideTensor,
        of: &Gathered,
        data: &Bytes,
    ) -> impl Iterator<Item = SliceChunk> {
        let bytes = gather(of, data);
        let (head, first) = (of.part, of.offset);
        (0..bytes.len()).step_by(limits::CHUNK_BYTES).map(move |start| {
            let data = bytes.slice(start..bytes.len().min(start + limits::CHUNK_BYTES));
            let offset = first + start as u64;
            let index = self.count(data.len());
            SliceChunk { index, tensor: tensor.into(), head, offset, data: data.into() }
        })
    }
}

fn gather(of: &Gathered, data: &Bytes) -> Bytes {
    if let [run] = &of.runs[..] {
        return data.slice(run.clone());
    }
    let mut gathered = BytesMut::with_capacity(of.runs.iter().map(|run| run.len()).sum());
    for run in &of.runs {
        gathered.extend_from_slice(&data[run.clone()]);
    }
    gathered.freeze()
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[test]
    fn runs_go_in_one_message_as_far_as_it_holds_them() {
        let data: Bytes = (0..3 * limits::CHUNK_BYTES).map(|i| (i % 251) as u8).collect();
        let (requests, _queue) = mpsc::channel(1);
        let mut to = Outgoing::new("w1".parse().unwrap(), requests);
        let runs = vec![3..5, 7..8, 100..100 + limits::CHUNK_BYTES];
        let of = Gathered { share: 0, part: 4, offset: 50, runs: runs.clone() };
        let chunks: Vec<SliceChunk> = to.cut_side(SideTensor::Mask, &of, &data).collect();
        let place: Vec<_> = chunks.iter().map(|chunk| (chunk.index, chunk.head, chunk.offset)).collect();
        assert_eq!(place, [(0, 4, 50), (1, 4, 50 + limits::CHUNK_BYTES as u64)]);
        let sent: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.data.iter().copied()).collect();
        assert!(sent == runs.into_iter().flatten().map(|at| data[at]).collect::<Vec<u8>>());
        let one = Gathered { share: 0, part: 0, offset: 0, runs: std::iter::once(9..20).collect() };
        let chunk = to.cut_side(SideTensor::Mask, &one, &data).next().unwrap();
        assert_eq!(chunk.data.as_ptr(), data[9..].as_ptr(), "one run is not copied");
        assert_eq!((to.sent.chunks, to.sent.bytes), (3, limits::CHUNK_BYTES as u64 + 3 + 11));
    }
}
