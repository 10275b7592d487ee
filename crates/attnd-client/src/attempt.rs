//! One attempt at a call: sends the operands and puts the answer together, both at once.

use attnd_kernel::{Compute, KERNEL_ID};
use attnd_wire::proto::attention_client::AttentionClient;
use attnd_wire::{AttendReply, Begin, Deadline, Done, Error, PlanSummary, Reason, proto, refusal};
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Request;
use tonic::transport::Channel;

use crate::client::Progress;
use crate::context::ContextAssembly;
use crate::inspected::{Inspected, OutputsAssembly};
use crate::operands::Operands;
use crate::upload::Upload;

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) context: Vec<f32>,
    pub(crate) lse: Vec<f32>,
    pub(crate) inspected: Inspected,
    pub(crate) plan: PlanSummary,
    pub(crate) done: Done,
}

/// Room for the whole answer.
#[derive(Debug)]
pub(crate) struct Assembly {
    pub(crate) context: ContextAssembly,
    /// `None` where nothing is wanted beside the context.
    pub(crate) outputs: Option<OutputsAssembly>,
}

impl Assembly {
    /// # Errors
    /// [`Reason::ShapeLimit`] and [`Reason::Outputs`] if this process can't get the memory; worth knowing before anything
    /// is sent.
    pub(crate) fn new(begin: &Begin) -> Result<Self, Error> {
        let outputs = begin.outputs.clone().map(|outputs| OutputsAssembly::new(begin.shape, outputs));
        Ok(Self { context: ContextAssembly::new(begin.shape)?, outputs: outputs.transpose()? })
    }

    pub(crate) fn outputs(&mut self) -> Result<&mut OutputsAssembly, Error> {
        self.outputs.as_mut().ok_or_else(|| invalid("no outputs are wanted"))
    }
}

/// Sends the call once, with the bytes of each of its [`Begin::sides`] `beside` it; the answer goes into `assembly`.
/// The deadline travels with it and is kept here too.
pub(crate) async fn attempt(
    stub: AttentionClient<Channel>,
    operands: &Operands,
    beside: &[Bytes],
    begin: Begin,
    assembly: Assembly,
    deadline: Option<Instant>,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Answer, Error> {
    let exchange = exchange(stub, operands, beside, begin, assembly, deadline, progress);
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, exchange)
            .await
            .unwrap_or_else(|_elapsed| Err(Deadline::expired())),
        None => exchange.await,
    }
}

async fn exchange(
    mut stub: AttentionClient<Channel>,
    operands: &Operands,
    beside: &[Bytes],
    begin: Begin,
    assembly: Assembly,
    deadline: Option<Instant>,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Answer, Error> {
    let total = begin.sides.bytes() + operands.total_bytes();
    let (report, mut sent) = watch::channel(0);
    let mut upload = Upload::new(operands.clone(), beside, begin.clone());
    let frames = std::iter::from_fn(move || {
        let frame = upload.next();
        report.send_replace(upload.bytes_sent());
        frame.map(proto::AttendRequest::from)
    });
    let mut request = Request::new(tokio_stream::iter(frames));
    if let Some(deadline) = deadline {
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    }

    let mut receipt = Receipt { begin, assembly, plan: None };
    let mut opening = std::pin::pin!(stub.attend(request));
    let mut replies = loop {
        tokio::select! {
            opened = &mut opening => break opened?.into_inner(),
            Ok(()) = sent.changed() => progress(Progress::Sent { bytes: *sent.borrow_and_update(), total }),
        }
    };
    loop {
        tokio::select! {
            reply = replies.message() => {
                let reply = reply?.ok_or_else(|| invalid("the answer ends before Done"))?;
                if let Some(done) = receipt.take(reply, progress)? {
                    return receipt.finish(done);
                }
            }
            Ok(()) = sent.changed() => progress(Progress::Sent { bytes: *sent.borrow_and_update(), total }),
        }
    }
}

/// What has come back so far.
#[derive(Debug)]
struct Receipt {
    begin: Begin,
    assembly: Assembly,
    plan: Option<PlanSummary>,
}

impl Receipt {
    /// Takes the next frame; `Some` with the last one.
    fn take(
        &mut self,
        reply: proto::AttendReply,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Option<Done>, Error> {
        match AttendReply::decode(reply, &self.begin.shape, self.begin.outputs.as_deref())? {
            AttendReply::Planned(_) if self.plan.is_some() => Err(invalid("two plans")),
            AttendReply::Planned(plan) => {
                // Coordinators that said nothing here knew one name.
                let said = if plan.kernel_id.is_empty() { KERNEL_ID } else { &plan.kernel_id };
                self.check_kernel(said)?;
                progress(Progress::Planned(plan.clone()));
                self.plan = Some(plan);
                Ok(None)
            }
            AttendReply::Context(chunk) => {
                let context = &mut self.assembly.context;
                context.accept(&chunk)?;
                progress(Progress::Received { rows: context.rows(), total: context.total_rows() });
                Ok(None)
            }
            AttendReply::Elements(elements) => {
                self.assembly.outputs()?.accept_elements(&elements).map(|()| None)
            }
            AttendReply::Report(report) => self.assembly.outputs()?.accept_report(&report).map(|()| None),
            AttendReply::Heat(rows) => self.assembly.outputs()?.accept_heat(&rows).map(|()| None),
            AttendReply::Done(done) => {
                self.check_kernel(&done.kernel_id)?;
                Ok(Some(done))
            }
        }
    }

    /// An old coordinator ignores what it doesn't know of an operator, and computes something else.
    fn check_kernel(&self, said: &str) -> Result<(), Error> {
        let asked = self.begin.operator.kernel_id(Compute::F32);
        if said == asked { Ok(()) } else { Err(refusal::older_coordinator(said, asked)) }
    }

    fn finish(self, done: Done) -> Result<Answer, Error> {
        let plan = self.plan.ok_or_else(|| invalid("an answer without a plan"))?;
        let Assembly { context, outputs } = self.assembly;
        let (context, lse) = context.finish()?;
        let inspected = outputs.map(OutputsAssembly::finish).transpose()?.unwrap_or_default();
        Ok(Answer { context, lse, inspected, plan, done })
    }
}

fn invalid(detail: &str) -> Error {
    Error::new(Reason::ReplyInvalid, detail)
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Dims, Dtype};

    use super::*;
    use crate::operands::AttendOptions;
    use crate::operands::tests::operands;

    /// What becomes of a plan and a Done with these names in the answer to a call of that scale.
    fn take(scale: f32, planned: &str, done: &str) -> Result<(), String> {
        let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries: 1, keys: 1, head_dim: 1, value_dim: 1 };
        let options = AttendOptions { scale: Some(scale), ..AttendOptions::default() };
        let begin = operands(dims, Dtype::F32).begin(&options).unwrap();
        let assembly = Assembly::new(&begin).unwrap();
        let mut receipt = Receipt { begin, assembly, plan: None };
        let plan = PlanSummary { kernel_id: planned.to_owned(), ..PlanSummary::default() };
        let done = Done { kernel_id: done.to_owned(), ..Done::default() };
        for reply in [AttendReply::Planned(plan), AttendReply::Done(done)] {
            receipt.take(reply.into(), &mut |_| {}).map_err(|error| error.message())?;
        }
        Ok(())
    }

    #[test]
    fn a_coordinator_that_ignores_the_operator_is_not_believed() {
        let refused = "REPLY_INVALID: the coordinator is older: it computes c1-f32, asked c1-f32-op1";
        assert_eq!(take(1.0, "", "c1-f32"), Ok(()));
        assert_eq!(take(1.0, "c1-f32", "c1-f32"), Ok(()));
        assert_eq!(take(-1.0, "c1-f32-op1", "c1-f32-op1"), Ok(()));
        for (planned, done) in [("", "c1-f32"), ("c1-f32", "c1-f32-op1"), ("c1-f32-op1", "c1-f32")] {
            assert_eq!(take(-1.0, planned, done), Err(refused.to_owned()), "{planned:?}, {done:?}");
        }
    }
}
