//! `gradclip completions`: prints a script by which a shell completes arguments.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::{Cli, CompletionsArgs};
use crate::failure::Failure;
use crate::print::print_by;

pub(crate) fn run(args: &CompletionsArgs) -> Result<(), Failure> {
    print_by(|stdout| stdout.write_all(&script(args.shell)))
}

fn script(shell: Shell) -> Vec<u8> {
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    script
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_option_is_completed_in_every_shell() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(script(*shell)).unwrap();
            for command in Cli::command().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell}: {command}");
                for option in command.get_arguments().filter_map(|option| option.get_long()) {
                    // fish writes `-l`, as it calls a long option.
                    let found =
                        [format!("--{option}"), format!("-l {option}")].iter().any(|text| script.contains(text));
                    assert!(found, "{shell}: {command} --{option}");
                }
            }
        }
    }
}
