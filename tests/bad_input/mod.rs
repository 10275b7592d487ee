//! The bad-input contract: what each malformed, hostile or impossible input gets, from running processes.
//!
//! Every row sends its input to a real cluster and demands the exact code, text, `attnd-reason` and `attnd-outcome`;
//! then a good call must give the right bits, and no process may have grown by 64 MiB at any moment. After each table
//! (after each row where a stream breaks off) the workers' memory must be free again. See [`scene`].
//!
//! The modules go by group: [`protocol`] is HTTP/2 and gRPC below the messages, [`stream_order`] the order of frames,
//! [`begin`] what a call may ask for, [`values`] the numbers in its tensors, [`beside`] its dense masks and biases,
//! [`source`] what workers make its keys and values of,
//! [`worker_port`] the same for a worker's own port, [`files`] what the command line refuses to read.
//!
//! Left out, because a one-shot call has none of it: sessions that disagree with a call, and tenants. Causal offsets,
//! windows and softcaps are where operators are decoded, in the tests of `attnd-wire`. Messages are never compressed,
//! so there are no decompression bombs.
//!
//! Three rows of the table of bad inputs are answered otherwise than it says:
//!
//! * Row 28, a shape of terabytes with a payload of 16 bytes, is KV_BUDGET with RESOURCE_EXHAUSTED. Memory is reserved
//!   from declared sizes before bytes are read, so nobody ever sees that the payload is short. Where the shape fits,
//!   16 bytes are PAYLOAD_LENGTH.
//! * Rows 31 and 32, tensors that disagree about a dimension, can't be said on this wire: Begin has one shape for all
//!   three. What is meant by them arrives as a tensor of the wrong length, and is PAYLOAD_LENGTH.

mod begin;
mod beside;
mod call;
mod files;
mod http2;
mod protocol;
mod scene;
mod source;
mod stream_order;
mod values;
mod worker_port;
