//! Extended attributes of an open file or directory (xattr(7)).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The largest value we write.
const MOST: usize = 1024;

#[allow(unsafe_code)]
pub fn get(file: impl AsFd, name: &str) -> io::Result<Option<Vec<u8>>> {
    let name = CString::new(name)?;
    let mut value = vec![0; MOST];
    // SAFETY: the name ends with NUL, and the buffer has the length that is told.
    let length =
        unsafe { libc::fgetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    match usize::try_from(length) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
            error => Err(error),
        },
    }
}

#[allow(unsafe_code)]
pub fn remove(file: impl AsFd, name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the name ends with NUL.
    match unsafe { libc::fremovexattr(file.as_fd().as_raw_fd(), name.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[allow(unsafe_code)]
pub fn set(file: impl AsFd, name: &str, value: &[u8]) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the name ends with NUL, and the value has the length that is told.
    let status =
        unsafe { libc::fsetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
