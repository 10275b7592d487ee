//! The replies of all shares of a call, of which some may be left unread for a while.

use std::task::{Context, Poll};

use attnd_wire::{ComputeReply, Error};
use tokio::sync::mpsc;

/// What a share says; `None`: nothing more.
pub(crate) type Said = Option<Result<ComputeReply, Error>>;
type Replies = mpsc::Receiver<Result<ComputeReply, Error>>;

/// The replies of all shares.
pub(crate) struct Incoming {
    /// `None` after the last one.
    shares: Vec<Option<Replies>>,
    /// Who is asked first: whoever was answered is asked last.
    turn: usize,
}

impl Incoming {
    pub(crate) fn new(shares: Vec<Replies>) -> Self {
        Self { shares: shares.into_iter().map(Some).collect(), turn: 0 }
    }

    /// What a share says next, or once that it says nothing more; `None` after the end of all. Where `wanted` isn't all
    /// of them, only those are read, and those whose worker is gone: nothing follows what is here.
    pub(crate) fn poll(
        &mut self,
        wanted: Option<&[usize]>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<(usize, Said)>> {
        let mut all_ended = true;
        for share in (self.turn..self.shares.len()).chain(0..self.turn) {
            let Some(Some(replies)) = self.shares.get_mut(share) else { continue };
            all_ended = false;
            if wanted.is_some_and(|wanted| !wanted.contains(&share)) && !replies.is_closed() {
                continue;
            }
            if let Poll::Ready(said) = replies.poll_recv(cx) {
                if said.is_none()
                    && let Some(replies) = self.shares.get_mut(share)
                {
                    *replies = None;
                }
                self.turn = share + 1;
                return Poll::Ready(Some((share, said)));
            }
        }
        if all_ended { Poll::Ready(None) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use attnd_wire::{Finished, Reason};
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn shares_take_turns_and_only_those_wanted_are_read_until_they_end() {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| mpsc::channel(2)).unzip();
        let mut incoming = Incoming::new(receivers);
        for sender in &senders {
            for partials in 0..2 {
                let said = ComputeReply::Finished(Finished { compute_seconds: 0.0, partials });
                sender.send(Ok(said)).await.unwrap();
            }
        }
        let mut next = |wanted: Option<&[usize]>| {
            let share = |said: Option<(usize, Said)>| said.map(|(share, said)| (share, said.is_some()));
            poll_fn(|cx| incoming.poll(wanted, cx)).now_or_never().map(share)
        };
        let heard: Vec<_> = (0..4).map(|_| next(None)).collect();
        assert_eq!(heard, [0, 1, 2, 0].map(|share| Some(Some((share, true)))));
        assert_eq!(next(Some(&[2])), Some(Some((2, true))));
        // Share 1 has one more, but isn't wanted; share 2 has nothing yet.
        assert_eq!(next(Some(&[2])), None);
        let [zero, one, two] = <[_; 3]>::try_from(senders).unwrap();
        drop(one);
        assert_eq!(next(Some(&[2])), Some(Some((1, true))));
        assert_eq!(next(Some(&[2])), Some(Some((1, false))));
        two.send(Err(Error::new(Reason::Internal, ""))).await.unwrap();
        assert_eq!(next(Some(&[2])), Some(Some((2, true))));
        drop((zero, two));
        assert_eq!((next(None), next(None)), (Some(Some((0, false))), Some(Some((2, false)))));
        assert_eq!(next(None), Some(None));
    }
}
