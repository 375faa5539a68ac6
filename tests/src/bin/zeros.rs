//! Whether a device holds nothing but zeros: `zeros DEVICE [FROM_MIB]` ends with
//! 0 where it does, with 1 where it does not, with 2 where that cannot be said.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::process::ExitCode;

const MIB: u64 = 1 << 20;
/// Large reads: system calls are slow in user-mode Linux.
const PIECE: usize = 4 << 20;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let from = words.get(1).map_or(Some(0), |text| text.parse().ok());
    match (words.first(), from) {
        (Some(device), Some(from)) => match holds_zeros(device, from) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(1),
            Err(error) => {
                eprintln!("{device}: {error}");
                ExitCode::from(2)
            }
        },
        _ => ExitCode::from(2),
    }
}

fn holds_zeros(device: &str, from_mib: u64) -> io::Result<bool> {
    let mut file = File::open(device)?;
    file.seek(SeekFrom::Start(from_mib * MIB))?;
    let (zeros, mut piece) = (vec![0; PIECE], vec![0; PIECE]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(true),
            read if piece[..read] != zeros[..read] => return Ok(false),
            _ => {}
        }
    }
}
