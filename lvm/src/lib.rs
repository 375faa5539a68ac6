//! LVM, file systems, mounts and quotas: the only code that touches them.
