#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gradclip_cli::fuzzing::arguments(data));
