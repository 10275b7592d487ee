//! V on its way past the sums that uniform rows need.
//!
//! A chunk of 1 MiB takes a fraction of a millisecond to add, too long for a runtime thread, and the order of the chunks is that of
//! the sums. So one chunk at a time goes through the compute pool, while its messages leave for the workers, and no frame of the
//! client is read meanwhile. No rows are merged meanwhile either: workers can't have computed a group before they had all of its V,
//! so the last chunk that its mean needs is the one in the pool, or has been there.

use std::sync::Arc;

use attnd_plan::Run;
use attnd_wire::{Begin, Error, Reason};
use bytes::Bytes;
use futures::future::BoxFuture;

use super::super::value_means::ValueMeans;
use crate::compute_pool::{ComputePool, WorkError};

/// The sums of a call whose empty rows are uniform.
pub(super) struct Averaging {
    /// Absent while a chunk is added to them.
    means: Option<ValueMeans>,
    adding: Option<BoxFuture<'static, Result<ValueMeans, WorkError>>>,
}

impl Averaging {
    /// Sums of nothing yet, where the call needs any.
    pub(super) fn of(begin: &Begin) -> Option<Self> {
        let is_needed = begin.operator.empty_row() == attnd_kernel::EmptyRow::Uniform;
        is_needed.then(|| Self { means: Some(ValueMeans::new(&begin.shape, begin.dtype)), adding: None })
    }

    /// Begins to add a chunk of V that is routed in these runs: each byte is in one of them, because each key is in one share.
    ///
    /// # Errors
    /// [`Reason::Internal`] while another chunk is added.
    pub(super) fn add(&mut self, pool: &ComputePool, runs: Vec<Run>, data: Bytes) -> Result<(), Error> {
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
        let Some(Self { means, adding: slot @ Some(_) }) = of else { return std::future::pending().await };
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
