//! `gradclip man`: prints manual pages, with the texts of `--help`.

use std::io;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::args::{Cli, ManArgs};
use crate::failure::Failure;
use crate::print::print_by;

pub(crate) fn run(args: &ManArgs) -> Result<(), Failure> {
    let mut command = program();
    if let Some(name) = &args.command {
        let found = command.find_subcommand(name).cloned();
        command = found.ok_or_else(|| Failure::Usage(format!("there is no command {name:?}: see gradclip --help")))?;
    }
    print_by(|mut stdout| write(command, &mut stdout))
}

/// The program; each command has the name of its page.
fn program() -> Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

fn write(command: Command, to: &mut dyn io::Write) -> io::Result<()> {
    Man::new(command).source(concat!("gradclip ", env!("CARGO_PKG_VERSION"))).manual("gradclip").render(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_every_option() {
        let program = program();
        for command in program.get_subcommands().chain([&program]) {
            let mut page = Vec::new();
            write(command.clone(), &mut page).unwrap();
            // Hyphens are escaped, so that they are not broken.
            let page = String::from_utf8(page).unwrap().replace("\\-", "-");
            let name = command.get_display_name().unwrap_or_else(|| command.get_name());
            assert!(page.contains(&format!(".TH {name} 1 ")), "{page}");
            for option in command.get_arguments().filter_map(|option| option.get_long()) {
                assert!(page.contains(&format!("--{option}\\fR")), "{name}: --{option}");
            }
            if command.has_subcommands() {
                for command in command.get_subcommands() {
                    assert!(page.contains(&format!("gradclip-{}(1)", command.get_name())), "{command}");
                }
            }
        }
    }
}
