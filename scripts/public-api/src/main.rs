//! Prints the public items of a library, one a line, from what rustdoc says of it in JSON.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args_os().nth(1).ok_or("usage: list-public-api FILE.json")?;
    // What holds for every type there is says nothing.
    let api = public_api::Builder::from_rustdoc_json(file).omit_blanket_impls(true).build()?;
    for item in api.items().map(ToString::to_string) {
        // Of what a compiler finds out by itself, users rely on this, and the rest changes with the compiler.
        let automatic = [" core::marker::", "panic::unwind_safe::"].iter().any(|path| item.contains(path));
        let relied_on = ["Send", "Sync", "Copy"].map(|name| format!("core::marker::{name} for "));
        if !item.starts_with("impl") || !automatic || relied_on.iter().any(|name| item.contains(name)) {
            println!("{item}");
        }
    }
    Ok(())
}
