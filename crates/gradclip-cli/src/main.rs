//! The program `gradclip`; see the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa's device-select layer prints an error to stderr wherever there is no desktop session; this turns it off.
        // SAFETY: No other thread runs yet, so none can read the environment meanwhile.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
    gradclip_cli::main()
}
