//! Gradients by name: patterns, and which gradients `--only` and `--except` take.

use crate::args::SelectArgs;
use crate::failure::Failure;
use crate::input::Input;

impl SelectArgs {
    /// Whether there is a selection.
    pub(crate) fn is_given(&self) -> bool {
        !(self.only.is_empty() && self.except.is_empty())
    }

    /// Takes gradients of these inputs. The others pass through, like tensors that are no gradients.
    pub(crate) fn take(&self, inputs: &mut [Input]) -> Result<(), Failure> {
        let fitting: Vec<_> = inputs.iter_mut().map(|input| self.take_of(input)).collect();
        self.check(&fitting)
    }

    /// Takes gradients of one of several inputs. Returns for each pattern whether it fits one of its gradients.
    pub(crate) fn take_of(&self, input: &mut Input) -> Vec<bool> {
        let fits_any = |name: &str, patterns: &[String]| patterns.iter().any(|pattern| fits(name, pattern));
        let entries = || input.files.iter().flat_map(|file| &file.entries).filter(|entry| entry.may_be_gradient());
        let fitting = |(_, pattern): (_, &String)| entries().any(|entry| fits(&entry.name, pattern));
        let fitting = self.patterns().map(fitting).collect();
        input.retain(|name| (self.only.is_empty() || fits_any(name, &self.only)) && !fits_any(name, &self.except));
        fitting
    }

    /// Checks that each pattern fits a gradient of some input, so that nobody relies on one that does not.
    pub(crate) fn check(&self, inputs: &[Vec<bool>]) -> Result<(), Failure> {
        let unused = self.patterns().enumerate().find(|(i, _)| !inputs.iter().any(|fitting| fitting[*i]));
        unused.map_or(Ok(()), |(_, (option, pattern))| Err(no_such_gradient(option, pattern)))
    }

    fn patterns(&self) -> impl Iterator<Item = (&'static str, &String)> {
        let except = self.except.iter().map(|pattern| ("--except", pattern));
        self.only.iter().map(|pattern| ("--only", pattern)).chain(except)
    }
}

/// The failure of an option whose pattern fits no gradient.
pub(crate) fn no_such_gradient(option: &str, pattern: &str) -> Failure {
    Failure::Usage(format!("{option} {pattern:?}: no gradient in the files has this name"))
}

/// Whether a name fits a pattern, in which `*` stands for any characters, or none, and `?` for one.
pub(crate) fn fits(name: &str, pattern: &str) -> bool {
    let (name, pattern): (Vec<_>, Vec<_>) = (name.chars().collect(), pattern.chars().collect());
    let (mut at, mut next) = (0, 0);
    // Behind the last `*` in the pattern, and the place in the name up to which that stands.
    let mut star = None;
    while at < name.len() {
        match pattern.get(next) {
            Some('*') => {
                next += 1;
                star = Some((next, at));
            }
            Some(&c) if c == '?' || c == name[at] => (at, next) = (at + 1, next + 1),
            // It takes one more character. What an earlier one takes need not change.
            _ => match &mut star {
                Some((behind, taken)) => {
                    *taken += 1;
                    (at, next) = (*taken, *behind);
                }
                None => return false,
            },
        }
    }
    pattern[next..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn patterns() {
        for (name, pattern) in [
            ("a", "a"),
            ("a", "*"),
            ("", "*"),
            ("", ""),
            ("a.bias", "*.bias"),
            ("abcbc", "a*bc"),
            ("abab", "*ab*"),
            ("aXbXc", "a*b*c"),
            ("layer.7.weight", "layer.?.*"),
            ("größe", "gr??e"),
            ("mississippi", "m*iss*ip?i"),
            ("a*", "a?"),
        ] {
            assert!(fits(name, pattern), "{name} {pattern}");
        }
        for (name, pattern) in [
            ("a", "b"),
            ("a", ""),
            ("", "?"),
            ("ab", "a"),
            ("a.bias", "bias*"),
            ("ab", "ab*b"),
            ("aXb", "a*Y*b"),
            ("layer.12.weight", "layer.?.*"),
            ("ab", "ab?"),
        ] {
            assert!(!fits(name, pattern), "{name} {pattern}");
        }
    }
}
