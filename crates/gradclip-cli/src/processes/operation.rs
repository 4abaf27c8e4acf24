//! The operation of all ranks: to measure the files, or to clip them into OUT.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gradclip::{Clip, ClipReport, DecidedClip, Scope, Tensor};
use gradclip_common::text::{exact, plural, table};

use super::args::{Cli, ClipArgs, Command, CommonArgs, NormArgs};
use super::assignment::{AllFiles, FileSummary, owners};
use super::folder::Folder;
use super::lockstep::{Exit, Lockstep};
use crate::backend::Backend;
use crate::clip;
use crate::description::{MODE_NEEDED, clamps, measuring, refuse};
use crate::failure::Failure;
use crate::groups::Groups;
use crate::input::{Input, explain, is_index, unchanged, unsupported_warning};
use crate::layout::Content;
use crate::output::{Copies, Output};
use crate::print::{printed, remark};
use crate::progress;
use crate::report::{Ranks, Summary};

/// What all ranks do.
#[derive(Debug)]
pub(super) struct Operation {
    groups: Groups,
    args: CommonArgs,
    /// OUT, and whether it may be replaced; `None` if the gradients are only measured.
    out: Option<(PathBuf, bool)>,
    /// What OUT will hold.
    content: Content,
}

/// The files of this rank.
#[derive(Debug)]
struct OwnFiles {
    inputs: Vec<Input>,
    /// Their numbers among all files.
    numbers: Vec<usize>,
}

/// What a rank has when it begins to measure.
struct Prepared<'o, 'a> {
    tensors: Vec<Tensor<'a>>,
    /// Which of them count.
    counted: Vec<bool>,
    backend: Backend,
    /// The copies that a GPU clips.
    copies: Option<Copies<'o, 'a>>,
}

impl Operation {
    pub(super) fn new(cli: Cli, local_rank: u32) -> Result<Self, Failure> {
        let mut content = Content::Same;
        let (groups, mut args, out) = match cli.command {
            Command::Norm(NormArgs { measure, common }) => {
                (measuring(measure.clip(Clip::norm(f64::INFINITY))?).into(), common, None)
            }
            Command::Clip(ClipArgs { out, force, out_dtype, options, common }) => {
                let clip = options.clip()?.ok_or_else(|| Failure::Usage(MODE_NEEDED.into()))?;
                if out_dtype.is_some() {
                    content = Content::Widened;
                }
                (options.groups(clip)?, common, Some((out, force)))
            }
        };
        let clip = groups.rest;
        refuse(&[
            (
                clip.scope != Scope::Global || clip.needs_parameters(),
                "ranks compute one norm of all gradients; for other scopes and for --agc, use gradclip on each file",
            ),
            (
                clamps(&clip) && !clip.report_norm && !args.replicated.is_empty(),
                "--replicated names tensors that a norm counts once; a clip by value measures no norm",
            ),
        ])?;
        if let Some(index) = args.files.iter().find(|file| is_index(file)) {
            let message = format!("{} is an index: name the files that it lists instead", index.display());
            return Err(Failure::Usage(message));
        }
        let mut names: Vec<_> = args.files.iter().filter_map(|file| file.file_name()).collect();
        names.sort();
        if let Some(name) = names.windows(2).find(|pair| pair[0] == pair[1]).filter(|_| out.is_some()) {
            return Err(Failure::Usage(format!("two files are called {:?}, and OUT can hold only one", name[0])));
        }
        clip.check()?;
        args.backend.local_rank = Some(local_rank);
        Ok(Self { groups, args, out, content })
    }

    pub(super) fn run(&self, lockstep: &Lockstep, stdout: &mut dyn Write) -> Result<(), Exit> {
        let other = |rank| {
            Failure::Setup(format!("rank {rank} sees other files than rank 0: all ranks must see the same files"))
        };
        let sizes = lockstep.same("sizes", self.sizes(), other)?;
        let opened = self.open(&owners(&sizes, lockstep.group.size()), lockstep.group.rank());
        let (own, opened) = lockstep.step("open", opened)?;
        let opened: Vec<_> = opened.into_iter().flatten().collect();
        let fitting: Vec<_> = opened.iter().map(|file: &FileSummary| file.fitting.clone()).collect();
        let selected = self.args.select.check(&fitting);
        let all_files = selected.and_then(|()| AllFiles::new(&self.args.files, opened, &self.args.replicated));
        let all_files = all_files.and_then(|files| {
            self.groups.check(&files.of_groups(&self.groups))?;
            Ok(files)
        });
        let all_files = all_files.map_err(|failure| lockstep.exit_with(&failure))?;

        let unsupported = all_files.opened.iter().flat_map(|file| file.unsupported.iter().cloned());
        let done = if self.out.is_some() { "clipped" } else { "measured" };
        if let Some(warning) =
            unsupported_warning(unsupported, done).filter(|_| lockstep.is_first() && !self.args.quiet)
        {
            remark(&warning);
        }
        let mut folder = self.folder(lockstep)?;
        let output = folder.as_ref().map(|folder| Output::into_folder(&own.inputs, folder.path(), self.content));
        let output = lockstep.step("layout", output.transpose().map(|output| (output, ())))?.0;
        let explained = |failure| {
            let failure = explain(&own.inputs)(self.located(failure, &all_files));
            folder.iter().fold(failure, |failure, folder| folder.with_final_path(failure))
        };
        let prepared = self.prepare(lockstep, &own, &all_files, output.as_ref()).map_err(&explained);
        let (mut prepared, fallbacks) = lockstep.step(
            "ready",
            prepared.map(|mut prepared| {
                let fallback = prepared.backend.fallback.take();
                (prepared, fallback)
            }),
        )?;
        if !self.hidden(lockstep) {
            prepared.backend.explain("");
            if let Some(why) = fallbacks.iter().flatten().next() {
                let count = fallbacks.iter().flatten().count();
                remark(&format!("{why}: {count} of {} ranks compute on the CPU", lockstep.group.size()));
            }
        }

        let start = Instant::now();
        let written = self.write(lockstep, &own, &mut prepared, output.as_ref()).map_err(&explained);
        if let (Some(folder), true) = (&mut folder, written.is_ok() && !lockstep.is_first()) {
            folder.leave_to_rank_0();
        }
        let with_lost = |reports: Vec<ClipReport>| {
            let lost: Vec<_> =
                reports.iter().map(|report| report.lost.map(|lost| (lost.zero, lost.infinite))).collect();
            (reports, lost)
        };
        let (mut reports, lost) = lockstep.step("done", written.map(with_lost))?;
        // Those of all ranks, by group.
        for (i, report) in reports.iter_mut().enumerate() {
            if let Some(all) = &mut report.lost {
                let of_ranks = lost.iter().filter_map(|of_rank| *of_rank.get(i)?);
                (all.zero, all.infinite) = of_ranks.fold((0, 0), |all, lost| (all.0 + lost.0, all.1 + lost.1));
            }
        }

        let time = start.elapsed();
        let finish = || {
            if lockstep.is_first() {
                folder.map_or(Ok(()), Folder::rename)?;
                let text = self.text((reports, time), &prepared, &all_files, lockstep.group.size())?;
                printed(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))?;
            }
            Ok(((), ()))
        };
        lockstep.step("end", finish()).map(|_| ())
    }

    /// Whether this rank shows no progress.
    fn hidden(&self, lockstep: &Lockstep) -> bool {
        self.args.quiet || self.args.json || !lockstep.is_first()
    }

    /// The sizes of all files.
    fn sizes(&self) -> Result<Vec<u64>, Failure> {
        let size = |file: &PathBuf| Ok(fs::metadata(file).map_err(Failure::io(file, "open"))?.len());
        self.args.files.iter().map(size).collect()
    }

    /// Opens this rank's files.
    fn open(&self, owners: &[u32], rank: u32) -> Result<(OwnFiles, Vec<FileSummary>), Failure> {
        let numbers: Vec<_> = (0..owners.len()).filter(|&number| owners[number] == rank).collect();
        let files = numbers.iter().map(|&number| &self.args.files[number]);
        let mut inputs = files.map(|file| Input::open(file)).collect::<Result<Vec<_>, _>>()?;
        let opened = inputs.iter_mut().zip(&numbers).map(|(input, &number)| {
            let fitting = self.args.select.take_of(input);
            FileSummary::new((number, rank), input, fitting, &self.groups, &self.args.replicated)
        });
        let opened = opened.collect();
        Ok((OwnFiles { inputs, numbers }, opened))
    }

    /// The folder that will be renamed to OUT. Rank 0 creates it, and the others open it.
    fn folder(&self, lockstep: &Lockstep) -> Result<Option<Folder>, Exit> {
        let Some((out, force)) = &self.out else { return Ok(None) };
        let created = lockstep.is_first().then(|| Folder::create(out, &self.args.files, *force)).transpose();
        let named = created.map(|folder| {
            let name = folder.as_ref().and_then(Folder::name).map(str::to_owned);
            (folder, name)
        });
        let (created, mut names) = lockstep.step("folder", named)?;
        let seen = match (created, names.swap_remove(0)) {
            (None, Some(name)) => Folder::open(out, &name).map(Some),
            (created, _) => Ok(created),
        };
        Ok(lockstep.step("seen", seen.map(|folder| (folder, ())))?.0)
    }

    /// Everything that can fail on one rank alone, before all ranks measure.
    fn prepare<'o, 'a>(
        &self,
        lockstep: &Lockstep,
        OwnFiles { inputs, numbers }: &'a OwnFiles,
        all_files: &AllFiles<'_>,
        output: Option<&'o Output<'a>>,
    ) -> Result<Prepared<'o, 'a>, Failure> {
        let (mut tensors, mut counted) = (Vec::new(), Vec::new());
        for (input, &number) in inputs.iter().zip(numbers) {
            counted.extend(input.gradients().map(|entry| all_files.counts(&entry.name, number)));
            tensors.append(&mut input.tensors()?);
        }
        tensors = tensors.into_iter().zip(&counted).map(|(tensor, &counted)| tensor.replica(!counted)).collect();
        let backend = Backend::choose(&self.args.backend, &tensors)?.processes(lockstep.group.clone());
        let copies = output.filter(|_| !backend.streams()).map(|output| {
            let bar = progress::bytes(output.bytes(), "copying", self.hidden(lockstep));
            output.copy(&bar)
        });
        Ok(Prepared { tensors, counted, backend, copies: copies.transpose()? })
    }

    /// Measures with the other ranks, and writes the files of this rank.
    fn write(
        &self,
        lockstep: &Lockstep,
        OwnFiles { inputs, .. }: &OwnFiles,
        Prepared { tensors, counted, backend, copies }: &mut Prepared<'_, '_>,
        output: Option<&Output<'_>>,
    ) -> Result<Vec<ClipReport>, Failure> {
        let hidden = self.hidden(lockstep);
        let bytes = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
        let bar = progress::bytes(bytes, if copies.is_some() { "clipping" } else { "measuring" }, hidden);
        backend.show_progress(&bar);
        if let Some(copies) = copies.take() {
            let reports = copies.clip(
                &[],
                |i| counted[i],
                |mut written| {
                    if self.content == Content::Widened {
                        clip::widen(tensors, &mut written)?;
                    }
                    backend.apply(&self.groups, written)
                },
            )?;
            return Ok(reports);
        }
        let Some(output) = output else {
            let mut report = backend.run(|clipper| clipper.measure(&self.groups.rest, tensors))?;
            // Nothing was to be written.
            report.skipped = None;
            return unchanged(inputs).map(|()| vec![report]);
        };
        let decided = backend.decide(&self.groups, tensors)?;
        unchanged(inputs)?;
        bar.finish_and_clear();
        let bar = progress::bytes(output.bytes(), "writing", hidden);
        backend.install(|| output.stream(&decided, &bar))?;
        Ok(decided.clips.iter().map(DecidedClip::report).collect())
    }

    /// What rank 0 prints.
    fn text(
        &self,
        (reports, time): (Vec<ClipReport>, Duration),
        Prepared { tensors, backend, .. }: &Prepared<'_, '_>,
        all_files: &AllFiles<'_>,
        count: u32,
    ) -> Result<String, Failure> {
        let (report, groups) = self.groups.report(tensors, reports);
        let file = report.non_finite.as_ref().and_then(|found| all_files.file_of(found, &self.groups));
        let others = all_files.opened.iter().map(|file| file.others).sum();
        let left_out = || all_files.opened.iter().map(|file| file.left_out).sum();
        let summary = Summary {
            report: &report,
            groups: &groups,
            has_norm: self.groups.rest.report_norm || !clamps(&self.groups.rest),
            clip: &self.groups.rest,
            tensors,
            sum: false,
            widened: self.content == Content::Widened,
            backend,
            time,
            file,
            ranks: Some(Ranks { count, tensors: all_files.tensors() }),
            others,
            left_out: self.args.select.is_given().then(left_out),
            histogram: None,
        };
        if self.args.json {
            let json = serde_json::to_string(&summary.json());
            return json.map(|json| json + "\n").map_err(|error| Failure::Setup(error.to_string()));
        }
        let mut lines = match (&self.out, self.args.quiet) {
            (None, true) => return Ok(exact(report.total_norm) + "\n"),
            (Some(_), true) => return Ok(String::new()),
            (None, false) => summary.measured(),
            (Some(_), false) => clip::lines(&summary),
        };
        if all_files.uncounted() > 0 {
            lines.push(("replicas", format!("{} not counted", plural(all_files.uncounted() as u64, "tensor"))));
        }
        lines.extend(summary.lines(all_files.opened.iter().map(|file| file.bytes).sum()));
        lines.extend(self.out.as_ref().map(|(out, _)| ("written to", out.display().to_string())));
        Ok(table(&lines))
    }
    /// Adds the file of a non-finite element to the failure.
    fn located(&self, failure: Failure, all_files: &AllFiles<'_>) -> Failure {
        match failure {
            Failure::NonFinite { found, .. } => {
                let place = all_files.file_of(&found, &self.groups).map(|file| format!(" in {}", file.display()));
                Failure::NonFinite { found, place: place.unwrap_or_default() }
            }
            other => other,
        }
    }
}
