//! Attention as others define and test it: their inputs, their expected outputs, their tolerance.

mod cluster;
mod onnx_data;
mod operands;
mod oracle;
