//! The command line: every verb, flag, default and help text is declared here and in the modules below, and nowhere
//! else. Verbs with many flags have a file of their own in `args/`.
//!
//! These are values as typed, checked one by one; what they mean together is decided by each verb before it touches
//! a file or a socket.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};

pub use self::attend::{AttendArgs, EmptyRowArg};
pub use self::bench::{Bench, BenchArgs, BenchKernelArgs, BenchPeersArgs};
pub use self::explain::{ExplainArgs, HeadChoice, PicturePath};
pub use self::layer::LayerArgs;
pub use self::operator::OperatorArgs;
pub use self::plan::PlanArgs;
pub use self::score_function::{FunctionArgs, ParamValue};
pub use self::scores::{ScoreArgs, Slopes};
pub use self::session::{
    AppendArgs, CloseArgs, ClusterArgs, DescribeArgs, ForkArgs, ListArgs, OpenArgs, QueryArgs, RowsArgs,
    SealArgs, SessionArgs, SessionAttendArgs, SessionVerb, StepArgs, TruncateArgs,
};
pub use self::site::SiteArgs;
pub use self::sparse::SparseArgs;
pub use self::tables::TableArgs;
pub use self::values::Sides;
use self::values::{parse_count, parse_interval, parse_size, parse_workers};

mod attend;
mod bench;
mod explain;
mod layer;
mod mask;
mod operator;
mod outputs;
mod plan;
mod score_function;
mod scores;
mod session;
mod site;
mod span;
mod sparse;
mod tables;
mod values;

/// Environment variable that stands in for `--endpoint`.
pub const ENDPOINT_ENV: &str = "ATTND_ENDPOINT";

/// Exact attention, sharded over processes and machines, with the same bits on any number of workers.
#[derive(Debug, Parser)]
#[command(
    name = "attnd",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "\
Start here:
  attnd demo                       real data through 1, 2, 3 and 4 local worker processes, checked
  attnd attend --workers 2 --q q.npy --k k.npy --v v.npy -o out.npy
                                   your own tensors on this machine
  attnd explain --workers 2 --q q.npy --k k.npy --heatmap map.png
                                   who attends to what in them

A cluster of several machines:
  attnd coordinator --listen 0.0.0.0:7400                                     on one of them
  attnd worker --coordinator http://HOST:7400 --listen 0.0.0.0:7401 \\
               --advertise http://THIS_HOST:7401                              on each of them
  attnd status --endpoint http://HOST:7400                                    who is there
  attnd session --help             keys and values that stay there, step by step

How fast this machine is, and how near to its limits attnd comes:
  attnd bench kernel

Exit codes:
   0  success
   1  failure: the cluster, the network, the disk, or a check of the demo
   2  unusable input or command line
  70  a part of a coordinator or worker broke
  75  a coordinator or worker was stopped before its calls had ended"
)]
pub struct Cli {
    /// How the process reports about itself.
    #[command(flatten)]
    pub log: LogArgs,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Logging; results go to stdout, logs and errors to stderr.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// Form of the log lines on stderr
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Human, env = "ATTND_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// What to log: a level (error, warn, info, debug, trace) or directives such as `attnd_node=debug,warn`
    /// [default: info for coordinator and worker, warn for the rest]
    #[arg(long, global = true, env = "ATTND_LOG", value_name = "FILTER")]
    pub log: Option<String>,
}

/// Forms of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For a person at a terminal
    Human,
    /// One JSON object per line
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show exact distributed attention on real data, checked, in under a minute
    Demo(DemoArgs),
    /// Compute attention over tensors from files
    Attend(Box<AttendArgs>),
    /// Show which keys queries attend to, head by head, with words and a heatmap
    Explain(Box<ExplainArgs>),
    /// List the score functions, with formulas and parameters
    Scores(ScoresArgs),
    /// Compute a layer of multi-head attention: its matrices here, its attention on the cluster
    Layer(Box<LayerArgs>),
    /// Keep keys and values on a cluster, append to them, attend over them
    Session(SessionArgs),
    /// Run a coordinator and N worker processes on this machine
    Local(LocalArgs),
    /// Show the workers of a cluster: host, instruction set, memory, load
    Status(StatusArgs),
    /// Show which worker of a cluster would hold which part of a session, and how many bytes
    Plan(PlanArgs),
    /// Run the coordinator of a cluster
    Coordinator(CoordinatorArgs),
    /// Run a worker and join a cluster
    Worker(WorkerArgs),
    /// Measure the kernels against this machine's own limits, or against other libraries
    Bench(BenchArgs),
    /// Print a shell completion script
    Completions(CompletionsArgs),
}

/// Arguments of `attnd demo`.
#[derive(Debug, Args)]
#[command(after_help = "\
For each number of workers the demo starts a coordinator and that many worker processes, sends them two attention
layers of a sentence encoder (bundled) and a synthetic sequence of 32,768 keys, and checks every result against an
f64 reference and against the bits of the other runs. It exits with 1 if any check fails.

Examples:
  attnd demo
  attnd demo --out /tmp/attnd-demo --workers-list 1,2,5,8
  attnd demo --json | jq .checks")]
pub struct DemoArgs {
    /// Where the heatmap goes; created if missing
    #[arg(long, value_name = "DIR", default_value = "attnd-demo")]
    pub out: PathBuf,
    /// Numbers of workers to run with
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "1,2,3,4", value_parser = parse_workers)]
    pub workers_list: Vec<NonZeroUsize>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `attnd local`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the endpoint on the first line of stdout once all workers have joined, then runs until Ctrl-C. The processes
end with this one, however it ends.

Example:
  attnd local --workers 3
  attnd status --endpoint http://127.0.0.1:PORT        in another terminal")]
pub struct LocalArgs {
    /// Worker processes to start
    #[arg(long, value_name = "N", default_value = "2", value_parser = parse_workers)]
    pub workers: NonZeroUsize,
    /// Compute threads of each worker [default: the cores, divided evenly]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub threads_per_worker: Option<NonZeroUsize>,
    /// Address of the coordinator; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// End when stdin ends, as it does when the parent process dies
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

/// Arguments of `attnd scores`.
#[derive(Debug, Args)]
#[command(after_help = "\
Shapes are those of one call: units, filters, taps and positions are as many as the parameters have; a leading num_heads
or num_kv_heads gives each head its own. A parameter without a default must be given.

Examples:
  attnd scores
  attnd scores --json | jq '.[] | select(.name == \"additive\").parameters'
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --score cosine --param beta=2.5")]
pub struct ScoresArgs {
    /// Print a JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `attnd status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  attnd status --endpoint http://10.0.0.1:7400
  attnd status --json | jq '.workers[].load'           with ATTND_ENDPOINT set")]
pub struct StatusArgs {
    /// Coordinator of a running cluster, such as http://127.0.0.1:7400 [env: ATTND_ENDPOINT]
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `attnd coordinator`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  attnd coordinator --listen 0.0.0.0:7400
  attnd coordinator --listen 0.0.0.0:7400 --state /var/lib/attnd")]
pub struct CoordinatorArgs {
    /// Address to serve clients and workers on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", env = "ATTND_LISTEN")]
    pub listen: SocketAddr,
    /// Directory for what outlives this process: which sessions there are and which workers hold them, and the coordinator's term, which
    /// grows with each start and by which workers refuse older coordinators. Made if missing, and used by one coordinator at a time.
    /// Without one sessions end with the process [default: none]
    #[arg(long, value_name = "DIR", env = "ATTND_STATE")]
    pub state: Option<PathBuf>,
    /// End when stdin ends, as it does when the parent process dies
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

/// Arguments of `attnd worker`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  attnd worker --coordinator http://127.0.0.1:7400
  attnd worker --coordinator http://10.0.0.1:7400 --listen 0.0.0.0:7401 --advertise http://10.0.0.2:7401
  attnd worker --coordinator http://10.0.0.1:7400 --host rack-3 --memory 8GiB --session-memory 64GiB

ATTND_ISA=avx512|avx2|neon|portable overrides the instruction set; the result's bits stay the same.")]
pub struct WorkerArgs {
    /// Coordinator to join
    #[arg(long, value_name = "URL", env = "ATTND_COORDINATOR")]
    pub coordinator: String,
    /// Address to serve the coordinator on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0", env = "ATTND_LISTEN")]
    pub listen: SocketAddr,
    /// URL under which the coordinator reaches this worker [default: http:// and the listen address]
    #[arg(long, value_name = "URL", env = "ATTND_ADVERTISE")]
    pub advertise: Option<String>,
    /// Name of this worker, 1 to 64 of A-Z a-z 0-9 . _ - [default: worker- and 8 random hex digits]
    #[arg(long, value_name = "ID", env = "ATTND_WORKER_ID")]
    pub id: Option<String>,
    /// Compute threads [default: the cores of this machine]
    #[arg(long, value_name = "N", env = "ATTND_THREADS", value_parser = parse_count)]
    pub threads: Option<NonZeroUsize>,
    /// Memory that keys, values and partials of calls may take, such as 512MiB or 8GiB. That of sessions comes on top; with both
    /// defaults a quarter of the machine's memory is left to all else [default: half of this machine's]
    #[arg(long, value_name = "SIZE", env = "ATTND_MEMORY", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// Memory that keys and values of sessions may take, such as 512MiB or 8GiB [default: a quarter of this machine's]
    #[arg(long, value_name = "SIZE", env = "ATTND_SESSION_MEMORY", value_parser = parse_size)]
    pub session_memory: Option<u64>,
    /// Seconds in which each full page of sessions is looked at about once whether it is as it was written, 1 to 86400; 0 turns it off. A
    /// replica with one that isn't is given up, and made again from another [default: 600]
    #[arg(long, value_name = "SECONDS", env = "ATTND_SCRUB_INTERVAL", value_parser = parse_interval)]
    pub scrub_interval: Option<Duration>,
    /// Failure domain of this worker, 1 to 64 of A-Z a-z 0-9 . _ -: replicas of a session are in different ones. Containers
    /// on one machine have host names of their own and need the machine's here [default: this machine's host name]
    #[arg(long, value_name = "LABEL", env = "ATTND_HOST")]
    pub host: Option<String>,
    /// End when stdin ends, as it does when the parent process dies
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

/// Arguments of `attnd completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  attnd completions bash > ~/.local/share/bash-completion/completions/attnd
  attnd completions zsh  > ~/.zfunc/_attnd
  attnd completions fish > ~/.config/fish/completions/attnd.fish")]
pub struct CompletionsArgs {
    /// Shell to write for
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// What `--endpoint` and its environment variable say; the flag wins, an empty variable counts as unset.
pub fn endpoint_or_env(flag: Option<&str>, env: impl Fn(&str) -> Option<String>) -> Option<String> {
    flag.map(str::to_owned).or_else(|| env(ENDPOINT_ENV)).filter(|url| !url.is_empty())
}

/// The environment variables that stand in for flags of single verbs. A process that is started with all its flags
/// must not inherit them; those of logging are for every process and not among them.
pub fn variables_of_verbs() -> Vec<OsString> {
    let cli = Cli::command();
    let flags = cli.get_subcommands().flat_map(clap::Command::get_arguments);
    flags.filter_map(|flag| flag.get_env().map(OsString::from)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_accepts_the_definition() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_and_every_flag_explains_itself_and_every_verb_has_an_example() {
        fn check(path: &str, verbs: &clap::Command) {
            for verb in verbs.get_subcommands() {
                let path = format!("{path} {}", verb.get_name());
                assert!(verb.get_about().is_some(), "{path} has no description");
                let examples = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(examples.contains(&path), "{path} has no example");
                for arg in verb.get_arguments() {
                    assert!(arg.get_help().is_some(), "{path} {} has no help", arg.get_id());
                }
                check(&path, verb);
            }
        }
        check("attnd", &Cli::command());
    }

    #[test]
    fn variables_of_single_verbs_are_known_and_those_of_all_left_alone() {
        let mut variables = variables_of_verbs();
        variables.sort();
        variables.dedup();
        let nodes = [
            "ADVERTISE",
            "COORDINATOR",
            "HOST",
            "LISTEN",
            "MEMORY",
            "SCRUB_INTERVAL",
            "SESSION_MEMORY",
            "STATE",
            "THREADS",
            "WORKER_ID",
        ];
        assert_eq!(variables, nodes.map(|name| OsString::from(format!("ATTND_{name}"))));
    }

    #[test]
    fn the_endpoint_flag_wins_over_the_environment() {
        let env = |key: &str| (key == "ATTND_ENDPOINT").then(|| "http://env:1".to_owned());
        assert_eq!(endpoint_or_env(Some("http://flag:1"), env).as_deref(), Some("http://flag:1"));
        assert_eq!(endpoint_or_env(None, env).as_deref(), Some("http://env:1"));
        assert_eq!(endpoint_or_env(None, |_| Some(String::new())), None);
    }
}
