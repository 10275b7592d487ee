//! A call that never leaves the process: checked as one that is sent, and put together as an answer that comes.

use attnd_kernel::{AttnShape, Dtype};
use attnd_wire::{AttendReply, Begin, Done, Error, PlanSummary, Reason};
use bytes::Bytes;

use crate::attempt::Assembly;
use crate::client::Attended;
use crate::error::ClientError;
use crate::inspected::OutputsAssembly;
use crate::operands::{AttendOptions, Operands};
use crate::side::beside;

/// What is asked for, for whoever computes it here (`attnd_node::in_process`), and where its answer is put together.
#[derive(Debug)]
pub struct LocalCall {
    /// What is to be computed.
    pub begin: Begin,
    /// The elements of the tensors of [`Begin::sides`], in that order.
    pub beside: Vec<Bytes>,
    /// Room for the answer.
    pub answer: LocalAnswer,
}

impl LocalCall {
    /// A call on operands of this shape and type. `workers` and `timeout` of the options mean nothing here.
    ///
    /// # Errors
    /// As [`crate::Client::attend`] before it sends, but for lengths of operands, which are not there yet.
    pub fn new(shape: AttnShape, dtype: Dtype, options: &AttendOptions) -> Result<Self, ClientError> {
        let begin = Operands::begin_of(shape, dtype, options)?;
        let (_, beside) = beside(options, &begin.shape)?;
        let answer = LocalAnswer { assembly: Assembly::new(&begin)? };
        Ok(Self { begin, beside, answer })
    }
}

/// An answer on its way.
#[derive(Debug)]
pub struct LocalAnswer {
    assembly: Assembly,
}

impl LocalAnswer {
    /// Puts a part of the answer in its place.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] for what came before, or nobody wanted.
    pub fn take(&mut self, reply: AttendReply) -> Result<(), Error> {
        match reply {
            AttendReply::Context(chunk) => self.assembly.context.accept(&chunk),
            AttendReply::Elements(elements) => self.assembly.outputs()?.accept_elements(&elements),
            AttendReply::Report(report) => self.assembly.outputs()?.accept_report(&report),
            AttendReply::Heat(rows) => self.assembly.outputs()?.accept_heat(&rows),
            AttendReply::Planned(_) | AttendReply::Done(_) => {
                Err(Error::new(Reason::ReplyInvalid, "a local call has no plan, and its end comes last"))
            }
        }
    }

    /// The answer, once all of it is here. It has no plan, and was never sent.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] with what is missing.
    pub fn finish(self, done: Done) -> Result<Attended, ClientError> {
        let Assembly { context, outputs } = self.assembly;
        let (context, lse) = context.finish()?;
        let inspected = outputs.map(OutputsAssembly::finish).transpose()?.unwrap_or_default();
        Ok(Attended {
            context,
            lse,
            inspected,
            plan: PlanSummary::default(),
            empty_rows: done.empty_rows,
            timings: done.timings,
            kernel_id: done.kernel_id,
            attempts: 0,
            retried_after: Vec::new(),
        })
    }
}
