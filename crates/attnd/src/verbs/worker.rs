//! `attnd worker`: joins a cluster and computes for it until it is asked to stop.

use anyhow::Context as _;
use attnd_node::worker::{self, WorkerConfig};
use attnd_plan::WorkerId;
use attnd_plan::topology::MAX_WORKER_ID;
use tokio::net::TcpListener;

use crate::args::WorkerArgs;
use crate::embedded::{self, StopSignal};
use crate::exit::BadInput;

/// Memory of a machine that doesn't tell how much it has.
const UNKNOWN_MEMORY: u64 = 8 << 30;

/// Listens, says where on one line of stdout, joins and serves.
///
/// # Errors
/// If a flag makes no sense, the address can't be listened on, the coordinator refuses this worker for good, or calls
/// had to be cut at the end.
pub async fn run(args: &WorkerArgs) -> anyhow::Result<()> {
    let id = args.id.as_deref().map(WorkerId::new).transpose();
    let config = WorkerConfig {
        coordinator: args.coordinator.clone(),
        advertise: args.advertise.clone(),
        id: id.map_err(|error| BadInput::new(error.to_string()))?,
        threads: args.threads.map_or_else(cores, Into::into),
        memory_budget: args.memory.unwrap_or_else(|| memory() / 2),
        host: args.host.clone().unwrap_or_else(host_name),
        session_memory: args.session_memory.unwrap_or_else(|| memory() / 4),
        scrub_interval: args.scrub_interval.unwrap_or(worker::SCRUB_INTERVAL),
    };
    let stop = StopSignal::install(args.exit_with_parent)?;
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("listen on {}", args.listen))?;
    embedded::announce(listener.local_addr()?)?;
    stop.serve(|asked| worker::run(listener, config, asked)).await
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

/// The memory that this process may use, in bytes.
pub fn memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    memory_limit(read).unwrap_or(UNKNOWN_MEMORY)
}

/// The name of this machine, as a failure domain.
fn host_name() -> String {
    domain_of(&rustix::system::uname().nodename().to_string_lossy())
}

/// A host name with other characters than a failure domain has replaced, and cut to its length. Machines without a name are
/// all one domain: it is safe to put no two replicas on them, and wrong to believe that they are apart.
fn domain_of(host: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    let label: String = host.chars().map(plain).take(MAX_WORKER_ID).collect();
    if label.is_empty() { "unnamed".to_owned() } else { label }
}

/// The machine's memory or the container's limit, whichever is less, in bytes. `read` gives the text of a file.
fn memory_limit(read: impl Fn(&str) -> Option<String>) -> Option<u64> {
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    });
    let container = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .into_iter()
        .filter_map(|path| read(path)?.trim().parse::<u64>().ok())
        .min();
    machine.into_iter().chain(container).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       24654276 kB\nMemFree:         1000 kB\n";

    #[test]
    fn a_container_may_have_less_than_its_machine() {
        let total = 24_654_276 * 1024;
        let with = |path: &'static str, text: &'static str| {
            memory_limit(|asked| {
                let is_meminfo = asked == "/proc/meminfo";
                if is_meminfo { Some(MEMINFO.into()) } else { (asked == path).then(|| text.into()) }
            })
        };
        assert_eq!(with("", ""), Some(total));
        assert_eq!(with("/sys/fs/cgroup/memory.max", "1073741824\n"), Some(1 << 30));
        assert_eq!(with("/sys/fs/cgroup/memory.max", "max\n"), Some(total));
        assert_eq!(with("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"), Some(total));
    }

    #[test]
    fn any_host_name_gives_a_failure_domain() {
        assert_eq!(domain_of("db-7.example.org"), "db-7.example.org");
        assert_eq!(domain_of("Jürgens PC"), "J-rgens-PC");
        assert_eq!((domain_of(""), domain_of(&"x".repeat(300)).len()), ("unnamed".to_owned(), 64));
        assert!(attnd_plan::topology::is_host_label(&host_name()));
    }

    #[test]
    fn a_machine_that_says_nothing_or_nonsense_is_unknown() {
        assert_eq!(memory_limit(|_| None), None);
        assert_eq!(memory_limit(|_| Some("MemTotal: many kB".into())), None);
    }
}
