//! What is done with the files: measured, or clipped into OUT.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gradclip::{Clip, ClipReport, Scope, Tensor};

use super::args::{Cli, ClipArgs, Command, NormArgs, SharedArgs};
use super::folder::Folder;
use super::share::{Opened, Whole, owners};
use super::together::{Stopped, Together};
use crate::args::{MODE_NEEDED, refuse};
use crate::backend::Backend;
use crate::clip;
use crate::failure::Failure;
use crate::input::{Input, explain, is_index, unchanged};
use crate::names::{clamps, measuring};
use crate::output::{Copies, Output};
use crate::progress;
use crate::report::{Outcome, Ranks, plural, printed, remark, table};

/// What all ranks were asked for.
#[derive(Debug)]
pub(super) struct Job {
    clip: Clip,
    args: SharedArgs,
    /// OUT, and whether it may be replaced; nothing if the gradients are only measured.
    out: Option<(PathBuf, bool)>,
}

/// The files that are this rank's.
#[derive(Debug)]
struct Share {
    inputs: Vec<Input>,
    /// Their places among all files.
    places: Vec<usize>,
}

/// What a rank has at hand when it begins to measure.
struct Ready<'o, 'a> {
    tensors: Vec<Tensor<'a>>,
    /// Which of them count.
    counted: Vec<bool>,
    backend: Backend,
    /// What a GPU clips.
    copies: Option<Copies<'o, 'a>>,
}

impl Job {
    pub(super) fn new(cli: Cli) -> Result<Self, Failure> {
        let (clip, args, out) = match cli.command {
            Command::Norm(NormArgs { measure, shared }) => {
                (measuring(measure.clip(Clip::norm(f64::INFINITY))?), shared, None)
            }
            Command::Clip(ClipArgs { out, force, how, shared }) => {
                let clip = how.clip()?.ok_or_else(|| Failure::Usage(MODE_NEEDED.into()))?;
                (clip, shared, Some((out, force)))
            }
        };
        refuse(&[
            (
                clip.scope != Scope::Global || clip.needs_parameters(),
                "ranks share the one norm of all gradients; what has a norm of its own needs no other file: use gradclip \
                 for each file",
            ),
            (
                clamps(&clip) && !args.replicated.is_empty(),
                "--replicated says what a norm counts once, and a clamp measures none",
            ),
        ])?;
        if let Some(index) = args.files.iter().find(|file| is_index(file)) {
            let message = format!("{} is an index: give the files that it lists instead", index.display());
            return Err(Failure::Usage(message));
        }
        let mut names: Vec<_> = args.files.iter().filter_map(|file| file.file_name()).collect();
        names.sort();
        if let Some(name) = names.windows(2).find(|pair| pair[0] == pair[1]).filter(|_| out.is_some()) {
            return Err(Failure::Usage(format!("two files are called {:?}, and OUT can hold only one", name[0])));
        }
        clip.check()?;
        Ok(Self { clip, args, out })
    }

    pub(super) fn run(&self, together: &Together, stdout: &mut dyn Write) -> Result<(), Stopped> {
        let other = |rank| Failure::Setup(format!("rank {rank} sees other files than rank 0: all must see the same"));
        let sizes = together.same("sizes", self.sizes(), other)?;
        let opened = self.open(&owners(&sizes, together.size()), together.rank());
        let (share, opened) = together.step("open", opened)?;
        let opened = opened.into_iter().flatten().collect();
        let whole = Whole::new(&self.args.files, opened, &self.args.replicated);
        let whole = whole.map_err(|failure| together.known_to_all(&failure))?;

        let mut folder = self.folder(together)?;
        let output = folder.as_ref().map(|folder| Output::into_folder(&share.inputs, folder.path()));
        let told = |failure| {
            let failure = explain(&share.inputs)(located(failure, &whole));
            folder.iter().fold(failure, |failure, folder| folder.told(failure))
        };
        let ready = self.ready(together, &share, &whole, output.as_ref()).map_err(&told);
        let (mut ready, fallbacks) = together.step(
            "ready",
            ready.map(|ready| {
                let fallback = ready.backend.fallback.clone();
                (ready, fallback)
            }),
        )?;
        if let Some(why) = fallbacks.iter().flatten().next().filter(|_| !self.hidden(together)) {
            let count = fallbacks.iter().flatten().count();
            remark(&format!("{why}: {count} of {} ranks compute on the CPU", together.size()));
        }

        let start = Instant::now();
        let written = self.write(together, &share, &mut ready, output.as_ref()).map_err(&told);
        if let (Some(folder), true) = (&mut folder, written.is_ok() && !together.is_first()) {
            folder.hand_over();
        }
        let (report, _) = together.step("done", written.map(|report| (report, ())))?;

        let time = start.elapsed();
        let finish = || {
            if together.is_first() {
                folder.map_or(Ok(()), Folder::place)?;
                let text = self.text((&report, time), &ready, &whole, together.size())?;
                printed(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))?;
            }
            Ok(((), ()))
        };
        together.step("end", finish()).map(|_| ())
    }

    /// Whether this rank shows no progress.
    fn hidden(&self, together: &Together) -> bool {
        self.args.quiet || self.args.json || !together.is_first()
    }

    /// How large all files are.
    fn sizes(&self) -> Result<Vec<u64>, Failure> {
        let size = |file: &PathBuf| Ok(fs::metadata(file).map_err(Failure::io(file, "open"))?.len());
        self.args.files.iter().map(size).collect()
    }

    /// Opens this rank's files.
    fn open(&self, owners: &[u32], rank: u32) -> Result<(Share, Vec<Opened>), Failure> {
        let places: Vec<_> = (0..owners.len()).filter(|&place| owners[place] == rank).collect();
        let files = places.iter().map(|&place| &self.args.files[place]);
        let inputs = files.map(|file| Input::open(file)).collect::<Result<Vec<_>, _>>()?;
        let opened = inputs.iter().zip(&places);
        let opened = opened.map(|(input, &place)| Opened::new(place, rank, input, &self.args.replicated)).collect();
        Ok((Share { inputs, places }, opened))
    }

    /// The folder that is to be OUT: rank 0 makes it, and the others see it.
    fn folder(&self, together: &Together) -> Result<Option<Folder>, Stopped> {
        let Some((out, force)) = &self.out else { return Ok(None) };
        let made = together.is_first().then(|| Folder::make(out, &self.args.files, *force)).transpose();
        let named = made.map(|folder| {
            let name = folder.as_ref().and_then(Folder::name).map(str::to_owned);
            (folder, name)
        });
        let (made, mut names) = together.step("folder", named)?;
        let seen = match (made, names.swap_remove(0)) {
            (None, Some(name)) => Folder::of_rank_0(out, &name).map(Some),
            (made, _) => Ok(made),
        };
        Ok(together.step("seen", seen.map(|folder| (folder, ())))?.0)
    }

    /// Everything that can fail on one rank alone, before all measure.
    fn ready<'o, 'a>(
        &self,
        together: &Together,
        Share { inputs, places }: &'a Share,
        whole: &Whole<'_>,
        output: Option<&'o Output<'a>>,
    ) -> Result<Ready<'o, 'a>, Failure> {
        let (mut tensors, mut counted) = (Vec::new(), Vec::new());
        for (input, &place) in inputs.iter().zip(places) {
            counted.extend(input.gradients().map(|entry| whole.counts(&entry.name, place)));
            tensors.append(&mut input.tensors()?);
        }
        tensors = tensors.into_iter().zip(&counted).map(|(tensor, &counted)| tensor.replica(!counted)).collect();
        let backend = Backend::choose(&self.args.backend, &tensors)?.within(together.group.clone());
        let copies = output.filter(|_| !backend.streams()).map(|output| {
            let bar = progress::bytes(output.bytes(), "copying", self.hidden(together));
            output.copy(&bar)
        });
        Ok(Ready { tensors, counted, backend, copies: copies.transpose()? })
    }

    /// Measures together with the other ranks, and writes this rank's part.
    fn write(
        &self,
        together: &Together,
        Share { inputs, .. }: &Share,
        Ready { tensors, counted, backend, copies }: &mut Ready<'_, '_>,
        output: Option<&Output<'_>>,
    ) -> Result<ClipReport, Failure> {
        let hidden = self.hidden(together);
        let bytes = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
        let bar = progress::bytes(bytes, if copies.is_some() { "clipping" } else { "measuring" }, hidden);
        backend.show_progress(&bar);
        if let Some(copies) = copies.take() {
            return copies.clip(&[], |i| counted[i], |written| backend.apply(&self.clip, written));
        }
        let Some(output) = output else {
            let report = backend.measure(&self.clip, tensors)?;
            return unchanged(inputs).map(|()| report);
        };
        let decided = backend.decide(&self.clip, tensors)?;
        unchanged(inputs)?;
        bar.finish_and_clear();
        let bar = progress::bytes(output.bytes(), "writing", hidden);
        backend.install(|| output.stream(&decided, &bar))?;
        Ok(decided.report())
    }

    /// What rank 0 prints.
    fn text(
        &self,
        (report, time): (&ClipReport, Duration),
        Ready { tensors, backend, .. }: &Ready<'_, '_>,
        whole: &Whole<'_>,
        count: u32,
    ) -> Result<String, Failure> {
        let file = report.non_finite.as_ref().and_then(|found| whole.file_of(found));
        let (scope, ranks) = (Scope::Global, Some(Ranks { count, tensors: whole.tensors() }));
        let outcome = Outcome { report, scope, tensors, sum: false, backend, time, file, ranks };
        if self.args.json {
            let json = serde_json::to_string(&outcome.json());
            return json.map(|json| json + "\n").map_err(|error| Failure::Setup(error.to_string()));
        }
        let mut lines = match (&self.out, self.args.quiet) {
            (None, true) => return Ok(format!("{}\n", report.total_norm)),
            (Some(_), true) => return Ok(String::new()),
            (None, false) => outcome.measured(&self.clip),
            (Some(_), false) => clip::lines(&self.clip, &outcome),
        };
        if whole.uncounted() > 0 {
            lines.push(("replicas", format!("{} not counted", plural(whole.uncounted() as u64, "tensor"))));
        }
        let others = whole.opened.iter().map(|file| file.others).sum();
        lines.extend(outcome.lines(others, whole.opened.iter().map(|file| file.bytes).sum()));
        lines.extend(self.out.as_ref().map(|(out, _)| ("written to", out.display().to_string())));
        Ok(table(&lines))
    }
}

/// Says of a non-finite element which file it lies in.
fn located(failure: Failure, whole: &Whole<'_>) -> Failure {
    match failure {
        Failure::NonFinite { found, .. } => {
            let place = whole.file_of(&found).map(|file| format!(" in {}", file.display()));
            Failure::NonFinite { found, place: place.unwrap_or_default() }
        }
        other => other,
    }
}
