//! Where the keys and values of a call are projected, and what that has travel.
//!
//! On the client, K and V travel to the coordinator, which sends each worker its part. On the workers, the rows that they are made of
//! travel as they are: to the coordinator once, and from there to each worker that has keys of these rows in any of its heads, so
//! that where a call is cut by heads, all rows go to all workers; with them go the matrices of each worker's heads. Attention makes
//! rows wider where heads times their dimensions exceed a row's width, and narrower with few kv heads; so either may have less to send.
//! Queries, which every share of a head needs, are projected on the client always, as are gate and result.
//!
//! Both are predicted by the planner's own model ([`attnd_plan::CostModel`] as coordinators have it unless told otherwise), over the
//! workers that the coordinator knows: bytes to the workers, what they compute, projections included, partials, messages. On top of
//! that come the bytes that the client sends, at the rate of a link, and its own work: its operations at the rate that its linear layers
//! reach, which is measured once, and the heads that are put together out of rows. The faster one is chosen; at equal times, the client.
//!
//! Measured with `attnd layer` built with the profile `suite`, on two cores that other programs used as well, which makes ratios of
//! these seconds mean more than the seconds: 64 queries, 16,384 keys, 8 heads of 64, two workers of one thread, best of five calls each;
//! MB from the client / to workers.
//!
//! | width, kv heads | client: MB, seconds | workers: MB, seconds |
//! |---|---|---|
//! | 512, 8 | 67.2 / 67.2, 0.53 | 35.8 / 69.3, 0.55 |
//! | 128, 8 | 67.2 / 67.2, 0.38 | 9.0 / 17.4, 0.14 |
//! | 1024, 1 | 8.5 / 8.7, 0.11 | 67.8 / 68.4, 0.23 |
//!
//! Without the bytes that the client sends, the model chose the workers in the third row too; seconds are predicted too low by factors
//! of two to three there, as the loopback interface takes the cores that compute.
//!
//! What can't be made on workers ([`Obstacle`]) is decided for the client.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use attnd_kernel::{AttnShape, Dtype, EmptyRow, Kernels, Linear};
use attnd_plan::{Capacity, CostModel, MAX_WIDTH, PlanRequest, plan};
use attnd_wire::join::PROJECTIONS;
use attnd_wire::{Begin, ClusterStatus};

use super::attention::{LayerCall, off_the_runtime};
use super::{Inner, Layer, LayerError, Rows};
use crate::client::Client;
use crate::error::ClientError;
use crate::operands::{AttendOptions, Operands};

/// Bytes of heads per second that are put together out of rows, or of pages out of rows.
const HEAD_BYTES_PER_SECOND: f64 = 2e9;

/// What the caller of a layer wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProjectOn {
    /// Wherever it is predicted to be faster.
    #[default]
    Auto,
    /// On the client.
    Client,
    /// On the workers; an error where they can't.
    Workers,
}

/// Where keys and values are projected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the client.
    Client,
    /// On the workers, each what it computes with.
    Workers,
}

/// Why keys and values can't be projected on workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The part of the layer, or the option of the call, as people write it.
    pub what: &'static str,
    /// Why not with that.
    pub why: &'static str,
}

/// Why they are projected where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaceReason {
    /// Somebody wanted it there.
    Asked,
    /// It is predicted to be faster.
    Faster,
    /// It is possible nowhere else.
    Only(Obstacle),
}

/// What a place is predicted to cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Bytes that the client sends to the coordinator: Q, K and V, or Q, rows and matrices; and masks and biases.
    pub client_bytes: u64,
    /// Bytes that the coordinator sends to the workers.
    pub worker_bytes: u64,
    /// The whole call.
    pub seconds: f64,
}

/// Where the keys and values of a call are projected. Its text has both predictions, as far as there are any.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProjectionPlan {
    /// Where.
    pub place: Place,
    /// Why there.
    pub reason: PlaceReason,
    /// What the client costs; `None` if the cluster can't compute the call, or wasn't asked because there was no choice.
    pub client: Option<Prediction>,
    /// What the workers cost.
    pub workers: Option<Prediction>,
    /// Operations of the projections of keys and values.
    pub flops: u64,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "the client",
            Self::Workers => "the workers",
        })
    }
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client_bytes, worker_bytes, seconds } = self;
        write!(
            f,
            "{client_bytes} bytes to the coordinator, {worker_bytes} to workers, {:.1} ms",
            seconds * 1e3
        )
    }
}

impl fmt::Display for ProjectionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, reason, client, workers, flops } = self;
        let mflop = *flops as f64 / 1e6;
        write!(f, "keys and values are projected on {place}, {mflop:.1} MFLOP, ")?;
        match reason {
            PlaceReason::Asked => f.write_str("as asked")?,
            PlaceReason::Faster => f.write_str("which is predicted to be faster")?,
            PlaceReason::Only(obstacle) => write!(f, "because workers can't ({obstacle})")?,
        }
        let predictions = [(Place::Client, client), (Place::Workers, workers)];
        for (place, prediction) in predictions.into_iter().filter_map(|(place, of)| Some((place, (*of)?))) {
            write!(f, "; on {place}: {prediction}")?;
        }
        Ok(())
    }
}

impl Layer {
    /// Where the keys and values of a call over these rows are projected, if they are for this call alone: where it is predicted to be
    /// faster, unless `on` says otherwise. Asks the coordinator what workers there are.
    ///
    /// # Errors
    /// As [`Self::call`]; [`LayerError::Together`] if workers are wanted and can't, with what keeps them from it.
    pub async fn plan(
        &self,
        client: &Client,
        [query, key, value]: [&Rows; 3],
        call: &LayerCall,
        on: ProjectOn,
    ) -> Result<ProjectionPlan, LayerError> {
        let layer = Arc::clone(&self.inner);
        layer.check_kv(key, value)?;
        let options = layer.options(call)?;
        let flops = layer.kv_flops(key, value);
        if let Some(obstacle) = layer.obstacle(&options) {
            let reason = match on {
                ProjectOn::Workers => return Err(obstacle.refused()),
                ProjectOn::Client => PlaceReason::Asked,
                ProjectOn::Auto => PlaceReason::Only(obstacle),
            };
            return Ok(ProjectionPlan { place: Place::Client, reason, client: None, workers: None, flops });
        }
        let shape = layer.shape(query, key.batch(), key.tokens())?;
        let source = Some(layer.source(key, value));
        let ways = off_the_runtime(move || {
            let begin = |options: &AttendOptions| {
                Operands::begin_of(shape, Dtype::F32, options).map_err(ClientError::from)
            };
            let on_client = begin(&options)?;
            let on_workers = begin(&AttendOptions { source, ..options })?;
            let query_bytes = shape.q_elements() * size_of::<f32>() as u64;
            Ok(Ways { client: on_client, workers: on_workers, query_bytes, flops })
        });
        let ways = ways.await?;
        match client.status().await {
            Ok(cluster) => {
                off_the_runtime(move || decide(on, &ways, &cluster, own_gflops(layer.kernels))).await
            }
            Err(error) if on == ProjectOn::Workers => Err(error.into()),
            // The call itself is sent again where that may help.
            Err(_no_answer) => {
                let why = "the coordinator doesn't say what workers there are";
                let reason = match on {
                    ProjectOn::Client => PlaceReason::Asked,
                    _ => PlaceReason::Only(Obstacle { what: "the cluster", why }),
                };
                Ok(ProjectionPlan { place: Place::Client, reason, client: None, workers: None, flops })
            }
        }
    }
}

impl Obstacle {
    /// The error of somebody who wants it all the same.
    pub(super) fn refused(self) -> LayerError {
        LayerError::Together { one: "project=workers", other: self.what, why: Some(self.why) }
    }
}

impl Inner {
    /// Why workers can't make keys and values of a call with these options, if they can't.
    pub(super) fn obstacle(&self, options: &AttendOptions) -> Option<Obstacle> {
        let width = self.key.inputs().max(self.value.inputs());
        let obstacles = [
            (self.rope.is_some(), "rope", "keys turn after they are projected"),
            (self.learnt.is_some(), "a learnt key", "it is made of no row"),
            (self.latent.is_some(), "latent attention", "latents are normalised after they are projected"),
            (
                options.empty_row == EmptyRow::Uniform,
                "empty_row=uniform",
                "the coordinator averages values as they pass",
            ),
            (width > MAX_WIDTH, "width", "rows are too wide"),
        ];
        let mut there = obstacles.into_iter().filter(|(is_there, ..)| *is_there);
        there.next().map(|(_, what, why)| Obstacle { what, why })
    }

    /// Operations of the projections of keys and values.
    pub(super) fn kv_flops(&self, key: &Rows, value: &Rows) -> u64 {
        let of = |linear: &Linear, rows: &Rows| {
            let n = (rows.batch() * rows.tokens()) as u64;
            n.saturating_mul(2 * linear.inputs() as u64).saturating_mul(linear.outputs() as u64)
        };
        // Where values are parts of keys, nothing makes them.
        let of_values = if self.latent.is_some() { 0 } else { of(&self.value, value) };
        of(&self.key, key).saturating_add(of_values)
    }
}

/// The two ways to make a call.
pub(super) struct Ways {
    /// With keys and values that are sent.
    pub(super) client: Begin,
    /// With those that workers make.
    pub(super) workers: Begin,
    /// Bytes of Q.
    pub(super) query_bytes: u64,
    /// Operations of the projections of keys and values.
    pub(super) flops: u64,
}

/// Decides where keys and values are projected: by prediction, unless somebody wants it somewhere. `gflops` is the rate of the
/// client's linear layers.
///
/// # Errors
/// [`LayerError::Together`] for workers that are wanted and can't.
pub(super) fn decide(
    on: ProjectOn,
    ways: &Ways,
    cluster: &ClusterStatus,
    gflops: f64,
) -> Result<ProjectionPlan, LayerError> {
    let Ways { client, workers, flops, .. } = ways;
    let able: Vec<Capacity> = capacities(cluster, PROJECTIONS);
    let kv_bytes = kv_bytes(&client.shape) as f64;
    let own_seconds = *flops as f64 / (gflops * 1e9) + kv_bytes / HEAD_BYTES_PER_SECOND;
    let on_client = predict(client, ways, &capacities(cluster, 0))
        .map(|of_call| Prediction { seconds: of_call.seconds + own_seconds, ..of_call });
    let on_workers = predict(workers, ways, &able);
    let plan = |place, reason| {
        Ok(ProjectionPlan { place, reason, client: on_client, workers: on_workers, flops: *flops })
    };
    if able.is_empty() {
        let why = "no active worker makes keys and values of rows";
        let obstacle = Obstacle { what: "the cluster", why };
        return match on {
            ProjectOn::Workers => Err(obstacle.refused()),
            ProjectOn::Client => plan(Place::Client, PlaceReason::Asked),
            ProjectOn::Auto => plan(Place::Client, PlaceReason::Only(obstacle)),
        };
    }
    match (on, on_client, on_workers) {
        (ProjectOn::Client, _, _) => plan(Place::Client, PlaceReason::Asked),
        (ProjectOn::Workers, _, _) => plan(Place::Workers, PlaceReason::Asked),
        (ProjectOn::Auto, Some(client), Some(workers)) if workers.seconds < client.seconds => {
            plan(Place::Workers, PlaceReason::Faster)
        }
        (ProjectOn::Auto, None, Some(_)) => plan(Place::Workers, PlaceReason::Faster),
        (ProjectOn::Auto, Some(_), None) => {
            let why = "too few make keys and values of rows, or have no room for rows and what they become";
            plan(Place::Client, PlaceReason::Only(Obstacle { what: "the workers", why }))
        }
        (ProjectOn::Auto, None, None) => {
            let why = "the call fits neither way, as it will say";
            plan(Place::Client, PlaceReason::Only(Obstacle { what: "the workers", why }))
        }
        // At equal times, and where there is no time to tell.
        (ProjectOn::Auto, Some(_), Some(_)) => plan(Place::Client, PlaceReason::Faster),
    }
}

/// The workers that may get new work and speak that version at least.
fn capacities(cluster: &ClusterStatus, version: u32) -> Vec<Capacity> {
    let usable =
        |worker: &&attnd_wire::WorkerStatus| worker.state == "ACTIVE" && worker.wire_version >= version;
    let workers = cluster.workers.iter().filter(usable).map(|worker| Capacity {
        id: worker.worker.clone(),
        gflops: worker.gflops,
        free_bytes: worker.memory_budget_bytes.saturating_sub(worker.memory_used_bytes),
    });
    workers.collect()
}

/// What the cluster makes of a call, the client's own work left out; `None` if it can't compute it.
fn predict(begin: &Begin, ways: &Ways, workers: &[Capacity]) -> Option<Prediction> {
    let request = PlanRequest {
        shape: begin.shape,
        operator: begin.operator.clone(),
        outputs: begin.outputs.clone(),
        dtype: begin.dtype,
        sides: begin.sides.clone(),
        workers: begin.workers,
    };
    let costs = CostModel::default();
    let planned = plan(&request, workers, &costs).ok()?;
    let kv_bytes = if begin.shape.kv_is_projected() { 0 } else { kv_bytes(&begin.shape) };
    let client_bytes = ways.query_bytes + kv_bytes + begin.sides.bytes();
    let upload_seconds = client_bytes as f64 / costs.link_bytes_per_second;
    Some(Prediction {
        client_bytes,
        worker_bytes: planned.sent_bytes,
        seconds: planned.predicted_seconds + upload_seconds,
    })
}

/// Bytes of K and V.
fn kv_bytes(shape: &AttnShape) -> u64 {
    (shape.k_elements() + shape.v_elements()) * size_of::<f32>() as u64
}

/// The rate of linear layers on all cores of this process, in 10^9 operations per second; measured by the first who asks, in some
/// milliseconds.
pub(super) fn own_gflops(kernels: &Kernels) -> f64 {
    const WIDTH: usize = 256;
    static MEASURED: OnceLock<f64> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        // Two blocks of rows for each core: a pass so short that the best of many was not disturbed.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let rows = 96 * 2 * cores;
        let Ok(linear) = Linear::new(&[0.5; WIDTH * WIDTH], [WIDTH, WIDTH], None) else { return 1.0 };
        let (x, mut y) = (vec![0.25; rows * WIDTH], vec![0.0; rows * WIDTH]);
        let mut best = f64::INFINITY;
        for _pass in 0..16 {
            let begun = Instant::now();
            linear.apply(kernels, &x, &mut y);
            best = best.min(begun.elapsed().as_secs_f64());
        }
        (2 * rows * WIDTH * WIDTH) as f64 / best.max(1e-9) * 1e-9
    })
}

#[cfg(test)]
mod tests;
