//! What the tests with real processes share: clusters of them, and cases with known answers.

pub(crate) mod cases;
pub(crate) mod cluster;
pub(crate) mod dense;
pub(crate) mod formula;
pub(crate) mod in_process;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod raw_call;
pub(crate) mod tap;
pub(crate) mod tokens;

use std::time::Duration;

use tokio::time::Instant;

/// Polls until `probe` gives something. For states of other processes, which announce themselves to nobody.
///
/// # Panics
/// With the time it took, when that is over `limit`.
pub(crate) async fn eventually<T>(
    what: &str,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Option<T>,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether the long lists are wanted; says loudly where they are not.
pub(crate) fn nightly(what: &str) -> bool {
    let wanted = std::env::var_os("ATTND_NIGHTLY").is_some_and(|value| value == "1");
    if !wanted {
        // Past the capture of the test harness, which shows nothing of a test that passes.
        let line = format!("SKIPPED, NOT TESTED: {what}. Set ATTND_NIGHTLY=1 to run it.\n");
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("stderr is open");
    }
    wanted
}
