//! `attnd session attend` and `attnd session step`: queries from a file, their context into one.

use std::num::NonZeroUsize;
use std::time::Instant;

use attnd_client::session::{QueryOptions, Session, SessionAttended};
use attnd_client::{AttendOptions, SessionSpec};
use serde::Serialize;

use super::append::{AppendReport, Rows, check_shape};
use super::ask;
use crate::args::{ClusterArgs, QueryArgs, SessionAttendArgs, SiteArgs, StepArgs};
use crate::exit::BadInput;
use crate::tensor_file::{self, Output, Tensor};
use crate::{options, output, score_numbers, table};

/// Attends over a layer.
pub(super) async fn attend(args: &SessionAttendArgs) -> anyhow::Result<()> {
    let query = Query::read(&args.query, &args.cluster)?;
    let layer = args.over.layer;
    let (attended, session, seconds) = ask(&args.cluster, async |sessions| {
        let session = sessions.read(&args.over.name).await?;
        let options = query.options(session.spec(), session.len(layer))?;
        let begin = Instant::now();
        let attended = session.attend(layer, query.q.bytes.clone(), &options).await?;
        Ok((attended, session, begin.elapsed().as_secs_f64()))
    })
    .await?;
    query.conclude(&session, layer, None, &attended, seconds)
}

/// Appends rows and attends over everything including them.
pub(super) async fn step(args: &StepArgs) -> anyhow::Result<()> {
    let query = Query::read(&args.query, &args.cluster)?;
    let rows = Rows::read(&args.rows)?;
    let layer = args.of.layer;
    let (stepped, session, seconds) = ask(&args.cluster, async |sessions| {
        let mut session = sessions.attach(&args.of.name).await?;
        let (k, v) = rows.of(session.spec())?;
        let (key, _) = session.spec().row_bytes();
        let tokens = k.len() / (key * session.spec().kv_heads).max(1);
        let options = query.options(session.spec(), session.len(layer) + tokens as u64)?;
        let begin = Instant::now();
        let stepped = session.step(layer, k, v, query.q.bytes.clone(), &options).await?;
        Ok((stepped, session, begin.elapsed().as_secs_f64()))
    })
    .await?;
    let appended = AppendReport::new(&session, layer, &stepped.appended);
    query.conclude(&session, layer, Some(appended), &stepped.attended, seconds)
}

/// Queries as they are in a file, and what is computed over them.
#[derive(Debug)]
struct Query<'a> {
    args: &'a QueryArgs,
    cluster: &'a ClusterArgs,
    q: Tensor,
    attend: AttendOptions,
}

impl<'a> Query<'a> {
    /// # Errors
    /// [`BadInput`] and those of reading.
    fn read(args: &'a QueryArgs, cluster: &'a ClusterArgs) -> anyhow::Result<Self> {
        if let Some(output) = &args.output {
            output.check().map_err(|error| BadInput::new(error.to_string()))?;
        }
        // Who computes is who holds the keys.
        let site = SiteArgs {
            endpoint: None,
            workers: None,
            threads_per_worker: None,
            use_workers: None,
            timeout: cluster.timeout,
        };
        let attend = AttendOptions {
            empty_row: args.empty_row.into(),
            allow_non_finite: args.allow_non_finite,
            ..options::of_flags(&args.operator, &site)?
        };
        Ok(Self { args, cluster, q: tensor_file::read(&args.q)?, attend })
    }

    /// What is asked of a layer of a session, with so many tokens.
    ///
    /// # Errors
    /// [`BadInput`] where the queries are none of the session's.
    fn options(&self, spec: &SessionSpec, len: u64) -> anyhow::Result<QueryOptions> {
        check_shape(("--q", &self.args.q), &self.q, [spec.heads, spec.head_dim])?;
        let at_len = self.args.at_len.map(NonZeroUsize::get);
        let keys = at_len.unwrap_or(usize::try_from(len).unwrap_or(usize::MAX)).max(1);
        let shape = spec.shape(self.q.shape[2], keys);
        let shape = shape.map_err(|error| BadInput::new(error.to_string()))?;
        options::check_documents(&self.args.operator, &shape)?;
        let score = score_numbers::spread(self.attend.score.clone(), &self.args.operator.function, &shape)?;
        Ok(QueryOptions {
            attend: AttendOptions { score, ..self.attend.clone() },
            dtype: Some(self.q.dtype),
            at_len: at_len.map(|len| len as u64),
            generation: self.args.generation,
        })
    }

    /// Writes the answer and says what it is.
    fn conclude(
        &self,
        session: &Session,
        layer: usize,
        appended: Option<AppendReport>,
        attended: &SessionAttended,
        seconds: f64,
    ) -> anyhow::Result<()> {
        let spec = session.spec();
        let shape = [1, spec.heads, self.q.shape[2], spec.value_dim];
        let shape = &shape[usize::from(!self.q.batched)..];
        let SessionAttended { context, lse, kernel_id, at_len, generation, attempts } = attended;
        let written = self
            .args
            .output
            .as_ref()
            .map(|to| tensor_file::write(to, &Output { shape, context, lse, kernel_id, arrays: &[] }));
        let path = self.args.output.as_ref().map(|output| output.path().display().to_string());
        let report = AttendReport {
            session: session.name().to_string(),
            layer,
            context_shape: shape.to_vec(),
            at_len: *at_len,
            generation: *generation,
            appended,
            client_seconds: seconds,
            attempts: *attempts,
            kernel_id: kernel_id.clone(),
            output: path.filter(|_| matches!(written, Some(Ok(())))),
        };
        // The step was made, and can't be made again: what is known of it is printed even where the disk is full.
        let reported = self.report(&report);
        written.transpose()?;
        reported
    }

    fn report(&self, report: &AttendReport) -> anyhow::Result<()> {
        if self.cluster.json {
            return output::json(report);
        }
        if let Some(appended) = &report.appended {
            output::line(&appended.line())?;
        }
        let result = format!(
            "context {:?}, f32, over {} tokens of layer {} in {}",
            report.context_shape,
            report.at_len,
            report.layer,
            table::seconds(report.client_seconds)
        );
        match &report.output {
            Some(path) => output::line(&format!("wrote {path}: {result}")),
            None if self.args.output.is_some() => Ok(()),
            None => output::line(&format!("{result}; -o FILE writes it")),
        }
    }
}

/// The `--json` form.
#[derive(Debug, Serialize)]
struct AttendReport {
    session: String,
    layer: usize,
    context_shape: Vec<usize>,
    at_len: u64,
    generation: u64,
    /// Of a step.
    appended: Option<AppendReport>,
    client_seconds: f64,
    attempts: u32,
    kernel_id: String,
    /// What was written, if anything.
    output: Option<String>,
}
