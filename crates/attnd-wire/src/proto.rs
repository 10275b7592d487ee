//! The generated messages, service traits, servers and clients of `proto/attnd/v1`.
// The generator writes for every project at once; its output is not ours to lint.
#![allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::all)]
#![allow(rustdoc::all, elided_lifetimes_in_paths)]

tonic::include_proto!("attnd.v1");
