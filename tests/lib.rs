//! Empty: a package needs a library or a program, and this one is its tests, which begin in `main.rs`.
