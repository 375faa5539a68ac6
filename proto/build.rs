//! Generates the Rust side of the contracts. protox compiles the .proto files
//! in this process, so that no `protoc` has to be installed anywhere.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["csi.proto", "lvprov.proto", "pluginregistration.proto"], ["proto"])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
