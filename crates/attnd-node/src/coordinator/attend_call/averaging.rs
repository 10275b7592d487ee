//! V on its way past the sums that uniform rows need.
//!
//! A chunk of 1 MiB takes a fraction of a millisecond to add, too long for a runtime thread, and the order of the chunks is that of
//! the sums. So one chunk at a time goes through the compute pool, while its messages leave for the workers, and no frame of the
//! client is read meanwhile. No rows are merged meanwhile either: workers can't have computed a group before they had all of its V,
//! so the last chunk that its mean needs is the one in the pool, or has been there.

use std::sync::Arc;

use attnd_plan::{Run, Tensor};
use attnd_wire::{Begin, Error, Reason};
use bytes::Bytes;
use futures::future::BoxFuture;

use super::super::value_means::ValueMeans;
use crate::compute_pool::{ComputePool, WorkError};

/// The sums of a call whose empty rows are uniform.
pub(super) struct Averaging {
    /// Whose chunks have the values.
    tensor: Tensor,
    /// Absent while a chunk is added to them.
    means: Option<ValueMeans>,
    adding: Option<BoxFuture<'static, Result<ValueMeans, WorkError>>>,
}

impl Averaging {
    /// Sums of nothing yet, where the call needs any.
    pub(super) fn of(begin: &Begin) -> Option<Self> {
        let is_needed = begin.operator.empty_row() == attnd_kernel::EmptyRow::Uniform;
        is_needed.then(|| Self {
            tensor: if begin.shape.value_is_key_prefix() { Tensor::K } else { Tensor::V },
            means: Some(ValueMeans::new(&begin.shape, begin.dtype)),
            adding: None,
        })
    }

    /// Begins to add a chunk that is routed in these runs, if it has values: each byte of K and V is in one of them, because each key
    /// is in one share.
    ///
    /// # Errors
    /// [`Reason::Internal`] while another chunk is added.
    pub(super) fn add(
        &mut self,
        pool: &ComputePool,
        tensor: Tensor,
        runs: Vec<Run>,
        data: Bytes,
    ) -> Result<(), Error> {
        if tensor != self.tensor {
            return Ok(());
        }
        let means = self.means.take();
        let mut means = means.ok_or_else(|| Error::new(Reason::Internal, "two chunks of V at a time"))?;
        let pool = pool.clone();
        let work = move || {
            for Run { head, head_offset, bytes, .. } in runs {
                means.add(head, head_offset, &data[bytes]);
            }
            means
        };
        self.adding = Some(Box::pin(async move { pool.run(work).await }));
        Ok(())
    }

    /// Whether a chunk is being added.
    pub(super) fn is_adding(&self) -> bool {
        self.adding.is_some()
    }

    /// Waits until the chunk is added; for ever where there is none. May be dropped and called again.
    ///
    /// # Errors
    /// [`Reason::Internal`] if adding panicked.
    pub(super) async fn added(of: &mut Option<Self>) -> Result<(), Error> {
        let Some(Self { means, adding: slot @ Some(_), .. }) = of else {
            return std::future::pending().await;
        };
        if let Some(adding) = slot {
            let added = adding.await;
            *slot = None;
            *means = Some(added.map_err(|error| Error::new(Reason::Internal, format!("adding {error}")))?);
        }
        Ok(())
    }

    /// The mean of a group whose rows are merged next.
    ///
    /// # Errors
    /// [`Reason::Internal`] if not all of its values have passed.
    pub(super) fn mean(&self, group: usize) -> Result<Arc<[f32]>, Error> {
        let mean = self.means.as_ref().and_then(|means| means.of(group));
        mean.ok_or_else(|| {
            Error::new(
                Reason::Internal,
                format!("group {group} was computed before all of its values were here"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use attnd_kernel::{AttnShape, Causal, Dims, Dtype, EmptyRow, Operator, OperatorParts};
    use attnd_plan::{Sides, WorkerChoice};

    use super::*;

    fn begin(empty_row: EmptyRow) -> Begin {
        let dims = Dims { batch: 1, heads: 2, kv_heads: 2, queries: 1, keys: 4, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let parts = OperatorParts { empty_row, ..OperatorParts::plain(1.0, Causal::None) };
        Begin {
            shape,
            dtype: Dtype::F32,
            operator: Arc::new(Operator::new(parts, &shape).unwrap()),
            outputs: None,
            sides: Sides::default(),
            allow_non_finite: false,
            forbid_empty_rows: false,
            workers: WorkerChoice::Auto,
        }
    }

    fn run(head: usize, head_offset: u64, bytes: std::ops::Range<usize>) -> Run {
        Run { share: 0, head, head_offset, bytes }
    }

    #[tokio::test]
    async fn chunks_are_added_one_at_a_time_whoever_stops_waiting() {
        let pool = ComputePool::new(1, 1).unwrap();
        let values: Vec<u8> = (0..8).flat_map(|value: u16| f32::from(value).to_le_bytes()).collect();
        let data = Bytes::from(values);
        let mut averaging = Averaging::of(&begin(EmptyRow::Uniform));
        let add = |averaging: &mut Option<Averaging>, runs| {
            averaging.as_mut().unwrap().add(&pool, Tensor::V, runs, data.clone())
        };
        // A chunk with the second half of one group and the first half of the next one comes second.
        for (runs, is_whole) in [
            (vec![run(0, 0, 0..8)], [false, false]),
            (vec![run(0, 8, 8..16), run(1, 0, 16..24)], [true, false]),
            (vec![run(1, 8, 24..32)], [true, true]),
        ] {
            add(&mut averaging, runs).unwrap();
            assert!(averaging.as_ref().unwrap().is_adding());
            assert_eq!(
                add(&mut averaging, Vec::new()).unwrap_err().message(),
                "INTERNAL: two chunks of V at a time"
            );
            // Somebody polls once and turns to something else.
            let polled = futures::poll!(Box::pin(Averaging::added(&mut averaging)));
            if polled.is_pending() {
                Averaging::added(&mut averaging).await.unwrap();
            }
            averaging.as_mut().unwrap().add(&pool, Tensor::K, vec![run(0, 0, 0..16)], data.clone()).unwrap();
            assert!(!averaging.as_ref().unwrap().is_adding(), "keys are no values");
            let means = [0, 1].map(|group| averaging.as_ref().unwrap().mean(group).is_ok());
            assert_eq!(means, is_whole);
        }
        let averaging = averaging.unwrap();
        let means = [0, 1].map(|group| averaging.mean(group).unwrap()[0]);
        assert_eq!(means, [1.5, 5.5]);
    }

    #[tokio::test]
    async fn who_adds_nothing_waits_for_nothing() {
        for mut averaging in [Averaging::of(&begin(EmptyRow::Zero)), Averaging::of(&begin(EmptyRow::Uniform))]
        {
            let polled = futures::poll!(Box::pin(Averaging::added(&mut averaging)));
            assert!(matches!(polled, Poll::Pending));
        }
        assert!(Averaging::of(&begin(EmptyRow::Nan)).is_none());
    }

    #[test]
    fn rows_of_a_group_whose_values_are_missing_are_refused() {
        let averaging = Averaging::of(&begin(EmptyRow::Uniform)).unwrap();
        assert_eq!(
            averaging.mean(1).unwrap_err().message(),
            "INTERNAL: group 1 was computed before all of its values were here"
        );
    }
}
