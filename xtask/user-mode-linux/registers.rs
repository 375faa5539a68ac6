//! Preloaded into user-mode Linux on processors whose extended registers need
//! more room than it knows of.
//!
//! Linux 6.1 as a process keeps 2696 bytes of a guest process's extended
//! registers: enough up to AVX-512. Where the host's kernel has more to keep
//! (AMX), it takes them back only whole (PTRACE_SETREGSET, ptrace(2)), and the
//! guest's kernel panics before its first process runs. What is missing is
//! filled up here with zeros: the header of the registers says that the parts
//! there are in their first state, which a guest's process cannot leave, as it
//! cannot ask for AMX.
//!
//! Built without the standard library: the guest's kernel replaces malloc.

#![no_std]

use core::arch::x86_64::__cpuid_count;
use core::cell::UnsafeCell;
use core::ffi::{c_int, c_long, c_void};
use core::sync::atomic::{AtomicUsize, Ordering};

const SYS_PTRACE: c_long = 101;
const PTRACE_PEEKTEXT: c_int = 1;
const PTRACE_PEEKUSER: c_int = 3;
const PTRACE_SETREGSET: c_int = 0x4205;
const NT_X86_XSTATE: usize = 0x202;

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn __errno_location() -> *mut c_int;
}

#[repr(C)]
struct Iovec {
    base: *mut c_void,
    length: usize,
}

/// All that the processor can have. Not on the stack: the guest's are small.
#[repr(C, align(64))]
struct Registers(UnsafeCell<[u8; Self::ROOM]>);

impl Registers {
    const ROOM: usize = 64 << 10;
}

// SAFETY: the guest's kernel has one processor, and calls ptrace from its one
// thread; no handler of a signal does.
unsafe impl Sync for Registers {}

static REGISTERS: Registers = Registers(UnsafeCell::new([0; Registers::ROOM]));

/// Bytes of the extended registers that the host's kernel has enabled.
fn whole() -> usize {
    static WHOLE: AtomicUsize = AtomicUsize::new(0);
    match WHOLE.load(Ordering::Relaxed) {
        // Asked once: a virtual machine leaves to its host for each answer.
        0 => {
            let size = __cpuid_count(0xd, 0).ebx as usize;
            WHOLE.store(size, Ordering::Relaxed);
            size
        }
        size => size,
    }
}

/// ptrace(2) as the C library has it, but for SETREGSET of too few extended registers.
///
/// # Safety
/// As ptrace(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptrace(request: c_int, pid: c_int, address: usize, data: *mut c_void) -> c_long {
    if request == PTRACE_SETREGSET && address == NT_X86_XSTATE {
        let (whole, registers) = (whole(), REGISTERS.0.get().cast::<u8>());
        // SAFETY: for SETREGSET, `data` points to an iovec, which says what may be read.
        let given = unsafe { &*data.cast::<Iovec>() };
        if given.length < whole && whole <= Registers::ROOM {
            // SAFETY: both are of that length at least. Zeros follow: no more than the given is ever written.
            unsafe { core::ptr::copy_nonoverlapping(given.base.cast::<u8>(), registers, given.length) };
            let mut all = Iovec { base: registers.cast(), length: whole };
            // SAFETY: `all` is valid for the call.
            return unsafe { syscall(SYS_PTRACE, request as c_long, pid as c_long, address, &raw mut all) };
        }
    }
    if (PTRACE_PEEKTEXT..=PTRACE_PEEKUSER).contains(&request) {
        // The kernel writes the word; the C library returns it.
        let mut word: c_long = 0;
        // SAFETY: `word` is valid for the call.
        let status = unsafe { syscall(SYS_PTRACE, request as c_long, pid as c_long, address, &raw mut word) };
        if status < 0 {
            return status;
        }
        // SAFETY: it is this thread's own.
        unsafe { *__errno_location() = 0 };
        return word;
    }
    // SAFETY: as the caller promises.
    unsafe { syscall(SYS_PTRACE, request as c_long, pid as c_long, address, data) }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
