//! `gradclip-web-bindgen WASM FOLDER`: writes the wasm and its JavaScript there, as a module for browsers. It is what
//! `wasm-bindgen --target web` does, without the rest of that program.

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(wasm), Some(folder)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: gradclip-web-bindgen WASM FOLDER");
    };
    let mut bindgen = wasm_bindgen_cli_support::Bindgen::new();
    bindgen.input_path(wasm).web(true)?.typescript(false).omit_default_module_path(false);
    bindgen.remove_name_section(true).remove_producers_section(true).generate(folder)
}
