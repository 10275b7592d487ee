//! Calls that this process computes, as whoever embeds attnd has them computed.

use std::sync::Mutex;

use attnd_client::{AttendOptions, Attended, ClientError, LocalCall, Operands};
use attnd_kernel::Kernels;
use attnd_node::in_process::{self, Tensors};

/// What the threads of this process give for a call that a cluster may be sent too.
pub(crate) fn attend(operands: &Operands, options: &AttendOptions) -> Result<Attended, ClientError> {
    let LocalCall { begin, beside, answer } = LocalCall::new(operands.shape, operands.dtype, options)?;
    let Operands { q, k, v, .. } = operands;
    let answer = Mutex::new(answer);
    let take = |reply| answer.lock().unwrap().take(reply);
    let tensors = Tensors { q, k, v, beside: &beside };
    let done = in_process::attend(Kernels::available()[0], &begin, tensors, &|| true, &take)?;
    answer.into_inner().unwrap().finish(done)
}
