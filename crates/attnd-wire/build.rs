//! Compiles the proto files into Rust, in Rust: no protoc is needed.

use std::error::Error;
use std::path::PathBuf;

const FILES: [&str; 6] = [
    "attnd/v1/attention.proto",
    "attnd/v1/cluster.proto",
    "attnd/v1/hold.proto",
    "attnd/v1/operator.proto",
    "attnd/v1/outputs.proto",
    "attnd/v1/session.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    // Asked when it runs: two checkouts that share a target folder share what is compiled of this.
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    for file in FILES {
        println!("cargo::rerun-if-changed={}", root.join(file).display());
    }
    let descriptors = protox::compile(FILES, [&root])?;
    // Bytes fields are slices of the received message instead of copies. What is boxed makes entries of a repeated field small, of
    // which a message may have very many that are empty.
    tonic_prost_build::configure()
        .codec_path("crate::codec::CountingCodec")
        .bytes(".attnd.v1")
        .boxed(".attnd.v1.Bias.kind.relative")
        .boxed(".attnd.v1.Bias.kind.swin")
        .boxed(".attnd.v1.Bias.kind.alibi")
        .boxed(".attnd.v1.Step.rows")
        .boxed(".attnd.v1.Step.queries")
        .boxed(".attnd.v1.ShardWork.rows")
        .boxed(".attnd.v1.ShardWork.queries")
        .compile_fds(descriptors)?;
    Ok(())
}
