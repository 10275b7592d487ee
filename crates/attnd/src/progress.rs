//! A progress bar on stderr for a call that takes longer than a second, on a terminal only.

use std::time::Duration;

use attnd_client::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

use crate::output;

/// Work shorter than this draws nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// The bar of one call; disappears when dropped.
#[derive(Debug)]
pub struct CallProgress {
    bar: ProgressBar,
    appears: Option<JoinHandle<()>>,
}

impl CallProgress {
    /// An invisible bar that appears after a second where stderr is a terminal. Needs a tokio runtime.
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let appears = output::is_watched().then(|| {
            let bar = bar.clone();
            tokio::spawn(async move {
                tokio::time::sleep(PATIENCE).await;
                bar.set_draw_target(ProgressDrawTarget::stderr());
                bar.enable_steady_tick(Duration::from_millis(100));
            })
        });
        Self { bar, appears }
    }

    /// Shows what the client reports. A retried call starts the bar again.
    pub fn update(&self, progress: &Progress) {
        match progress {
            Progress::Planned(_) => {}
            Progress::Sent { bytes, total } => self.show("sending", "{bytes}/{total_bytes}", *bytes, *total),
            Progress::Received { rows, total } => self.show("receiving", "{pos}/{len} rows", *rows, *total),
        }
        if matches!(progress, Progress::Sent { bytes, total } if bytes == total) {
            self.bar.set_message("computing");
        }
    }

    fn show(&self, message: &'static str, counts: &str, position: u64, total: u64) {
        let template = format!("{{spinner}} {{msg:9}} {{wide_bar:.cyan/dim}} {counts} {{elapsed}}");
        // A template that does not parse would leave the plain bar, which does as well.
        if let Ok(style) = ProgressStyle::with_template(&template) {
            self.bar.set_style(style);
        }
        self.bar.set_message(message);
        self.bar.set_length(total);
        self.bar.set_position(position);
    }
}

impl Drop for CallProgress {
    fn drop(&mut self) {
        if let Some(appears) = &self.appears {
            appears.abort();
        }
        self.bar.finish_and_clear();
    }
}
