//! `attnd status`: the workers of a cluster as its coordinator sees them now.

use anyhow::Context as _;
use attnd_client::{ClusterStatus, SessionCounts};
use serde::Serialize;

use crate::args::{ENDPOINT_ENV, StatusArgs, endpoint_or_env};
use crate::exit::{BadInput, connect};
use crate::{output, table};

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] without an endpoint; otherwise if the coordinator does not answer.
pub async fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let endpoint =
        endpoint_or_env(args.endpoint.as_deref(), |key| std::env::var(key).ok()).ok_or_else(|| {
            BadInput::new(format!("which cluster? --endpoint URL or {ENDPOINT_ENV} names its coordinator"))
        })?;
    let status = connect(&endpoint)?.status().await.with_context(|| endpoint)?;
    let report = StatusReport::from(&status);
    if args.json { output::json(&report) } else { print(&report) }
}

/// The `--json` form.
#[derive(Debug, Serialize)]
struct StatusReport {
    version: String,
    uptime_seconds: f64,
    calls_in_flight: u64,
    calls_finished: u64,
    calls_failed: u64,
    sessions: SessionsReport,
    workers: Vec<WorkerReport>,
}

/// Sessions by their worst shard, and late requests that were sent to another worker too.
#[derive(Debug, Serialize)]
struct SessionsReport {
    open: u64,
    repairing: u64,
    recovering: u64,
    degraded: u64,
    lost: u64,
    hedges_sent: u64,
    hedges_won: u64,
}

#[derive(Debug, Serialize)]
struct WorkerReport {
    id: String,
    address: String,
    state: String,
    isa: String,
    kernel_id: String,
    threads: usize,
    gflops: f64,
    memory_budget_bytes: u64,
    memory_used_bytes: u64,
    host: String,
    session_memory_bytes: u64,
    session_used_bytes: u64,
    calls_in_flight: u32,
    load: f64,
    seconds_since_heartbeat: f64,
    version: String,
}

impl From<&ClusterStatus> for StatusReport {
    fn from(status: &ClusterStatus) -> Self {
        let workers = status.workers.iter().map(|worker| WorkerReport {
            id: worker.worker.to_string(),
            address: worker.address.clone(),
            state: worker.state.clone(),
            isa: worker.isa.clone(),
            kernel_id: worker.kernel_id.clone(),
            threads: worker.threads,
            gflops: worker.gflops,
            memory_budget_bytes: worker.memory_budget_bytes,
            memory_used_bytes: worker.memory_used_bytes,
            host: worker.host.clone(),
            session_memory_bytes: worker.session_memory_bytes,
            session_used_bytes: worker.session_used_bytes,
            calls_in_flight: worker.calls_in_flight,
            load: worker.load,
            seconds_since_heartbeat: worker.since_heartbeat.as_secs_f64(),
            version: worker.version.clone(),
        });
        let SessionCounts { open, repairing, recovering, degraded, lost, hedges_sent, hedges_won } =
            status.sessions;
        Self {
            version: status.version.clone(),
            uptime_seconds: status.uptime.as_secs_f64(),
            calls_in_flight: status.calls_in_flight,
            calls_finished: status.calls_finished,
            calls_failed: status.calls_failed,
            sessions: SessionsReport { open, repairing, recovering, degraded, lost, hedges_sent, hedges_won },
            workers: workers.collect(),
        }
    }
}

fn print(report: &StatusReport) -> anyhow::Result<()> {
    output::line(&format!(
        "coordinator {}, up {}; calls: {} running, {} finished, {} failed",
        report.version,
        table::seconds(report.uptime_seconds),
        report.calls_in_flight,
        report.calls_finished,
        report.calls_failed
    ))?;
    let SessionsReport { open, repairing, recovering, degraded, lost, hedges_sent, hedges_won } =
        report.sessions;
    if open + repairing + recovering + degraded + lost > 0 {
        output::line(&format!(
            "sessions: {open} open, {repairing} repairing, {recovering} recovering, {degraded} degraded, {lost} lost; \
             {hedges_sent} late requests sent twice, {hedges_won} of them won"
        ))?;
    }
    if report.workers.is_empty() {
        return output::line("no worker has joined; start one with: attnd worker --coordinator URL");
    }
    let header = [
        "worker",
        "host",
        "state",
        "isa",
        "threads",
        "GFLOP/s",
        "memory",
        "sessions",
        "load",
        "calls",
        "heartbeat",
        "address",
    ];
    let mut table = table::with_header(header);
    let part = |used, all| format!("{} of {}", table::bytes(used), table::bytes(all));
    for worker in &report.workers {
        table.add_row([
            worker.id.clone(),
            worker.host.clone(),
            worker.state.clone(),
            worker.isa.clone(),
            worker.threads.to_string(),
            format!("{:.0}", worker.gflops),
            part(worker.memory_used_bytes, worker.memory_budget_bytes),
            part(worker.session_used_bytes, worker.session_memory_bytes),
            format!("{:.0} %", 100.0 * worker.load),
            worker.calls_in_flight.to_string(),
            format!("{} ago", table::seconds(worker.seconds_since_heartbeat)),
            worker.address.clone(),
        ]);
    }
    table::align_right(&mut table, &[4, 5, 6, 7, 8, 9, 10]);
    output::line(&table.to_string())
}
