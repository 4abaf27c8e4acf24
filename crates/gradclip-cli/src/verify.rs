//! `gradclip verify`: runs the same clips on GPU and CPU, and compares the results.

use std::iter::once;
use std::path::PathBuf;

use gradclip::gpu::GpuClipper;
use gradclip::{Clip, Mode, NonFinite, NormType, Scope, Tensor, Verification};
use gradclip_common::difference::{disagreement, ulps};
use gradclip_common::generated::{TestCase, largest_norm, with_parameters};
use gradclip_common::text::plural;
use serde_json::{Map, Value, json};

use crate::args::VerifyArgs;
use crate::backend;
use crate::description::refuse;
use crate::failure::Failure;
use crate::groups::Groups;
use crate::input::{Input, unchanged, unsupported_warning};
use crate::print::{print, print_json, remark};
use crate::progress;

/// The comparison of one clip.
struct Compared {
    clip: String,
    verification: Verification,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let hidden = args.quiet || args.json;
    let clip = args.options.clip()?;
    let without_file = clip.is_some() && args.file.is_none();
    refuse(&[
        (without_file, "generated gradients have generated clips: name a FILE, or leave out the mode"),
        (args.options.report_norm, "--report-norm goes with gradclip clip"),
        (args.file.is_none() && args.select.is_given(), "--only and --except take gradients of a FILE"),
    ])?;
    let open = |path: &Option<PathBuf>| path.as_deref().map(Input::open).transpose();
    let (mut input, params) = (open(&args.file)?, open(&args.options.params)?);
    args.select.take(input.as_mut_slice())?;
    let mut gpu = backend::open_gpu(args.adapter.as_deref(), None)?;
    if !args.no_tuning
        && let Some(tuned) = backend::tuned(&gpu)?
    {
        gpu = tuned;
        if !hidden {
            remark("on the GPU as tuned by gradclip tune");
        }
    }
    let compared = match &input {
        Some(input) => {
            if let Some(warning) = unsupported_warning(input.unsupported(), "compared").filter(|_| !hidden) {
                remark(&warning);
            }
            let parameters = input.parameters(params.as_ref())?;
            let tensors = with_parameters(input.tensors()?, &parameters);
            let compared = match clip {
                None => clips_for(&tensors).and_then(|clips| verify_file(&tensors, &clips, &gpu, hidden)),
                Some(clip) => verify_groups(&args.options.groups(clip)?, tensors, &gpu, hidden),
            };
            // GPU and CPU read the same only if nobody wrote meanwhile.
            unchanged(once(input).chain(&params))?;
            compared?
        }
        None => verify_generated(args, &gpu, hidden)?,
    };

    report(&compared, &gpu.device().adapter_info().name, args.json, args.quiet)
}

/// Prints the comparisons; a failure if any disagrees.
fn report(compared: &[Compared], adapter: &str, json: bool, quiet: bool) -> Result<(), Failure> {
    let differing = compared.iter().filter(|one| !one.verification.agrees()).count();
    let clips = plural(compared.len() as u64, "clip");
    if json {
        let cases: Vec<_> = compared.iter().map(Compared::json).collect();
        print_json(&json!({ "adapter": adapter, "agrees": differing == 0, "cases": cases }))?;
    } else {
        let shown = compared.iter().filter(|one| !quiet || !one.verification.agrees());
        let rows: String = shown.map(Compared::row).collect();
        if !rows.is_empty() {
            print(&format!("{:<54} {:>10} {:>5}\n{rows}", "clip", "norm error", "ulps"))?;
        }
        if !quiet && differing == 0 {
            print(&format!("GPU and CPU agree in {clips} on {adapter}\n"))?;
        }
    }
    match differing {
        0 => Ok(()),
        _ => Err(Failure::Mismatch(format!(
            "GPU and CPU disagree in {differing} of {clips} on {adapter}; use --backend cpu"
        ))),
    }
}

/// Clips of every kind, with thresholds that suit the gradients.
fn clips_for(tensors: &[Tensor<'_>]) -> Result<Vec<Clip>, Failure> {
    // Half of the largest norm is exceeded by at least one segment.
    let half = |norm_type, scope| {
        let clip = Clip::norm(0.0).norm_type(norm_type).scope(scope);
        Ok::<_, Failure>(with_mode(clip, Mode::Norm(0.5 * largest_norm(tensors, clip)?)))
    };
    let rms = Clip::rms(0.0).scope(Scope::Tensor);
    let l2 = half(NormType::L2, Scope::Global)?;
    Ok(vec![
        l2,
        half(NormType::L1, Scope::Global)?,
        half(NormType::Inf, Scope::Global)?,
        half(NormType::p(3.0), Scope::Global)?,
        half(NormType::L2, Scope::Tensor)?,
        half(NormType::L2, Scope::Unit)?,
        with_mode(rms, Mode::Rms(0.5 * largest_norm(tensors, rms)?)),
        // A third of normally distributed elements lie beyond the root of their mean square.
        Clip::value(largest_norm(tensors, Clip::rms(0.0))?),
        Clip::norm(2.0 * largest_norm(tensors, l2)?),
        // Both sides refuse the norms above if there are non-finite elements; not these.
        l2.non_finite(NonFinite::Propagate),
        l2.non_finite(NonFinite::Drop),
    ])
}

fn with_mode(mut clip: Clip, mode: Mode) -> Clip {
    clip.mode = mode;
    clip
}

fn verify_file(
    tensors: &[Tensor<'_>],
    clips: &[Clip],
    gpu: &GpuClipper,
    hidden: bool,
) -> Result<Vec<Compared>, Failure> {
    let bar = progress::count(clips.len() as u64, "verifying", hidden);
    let one = |clip: &Clip| {
        let verification = gradclip::verify(clip, tensors, gpu).wait()?;
        bar.inc(1);
        Ok(Compared { clip: format!("{clip:.2}"), verification })
    };
    clips.iter().map(one).collect()
}

fn verify_groups(
    groups: &Groups,
    tensors: Vec<Tensor<'_>>,
    gpu: &GpuClipper,
    hidden: bool,
) -> Result<Vec<Compared>, Failure> {
    let divided = groups.divide(tensors);
    let counts: Vec<_> = divided.iter().map(Vec::len).collect();
    groups.check(&counts)?;
    let each = groups.clips().zip(&divided).map(|(clip, tensors)| verify_file(tensors, &[clip], gpu, hidden));
    Ok(each.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
}

fn verify_generated(args: &VerifyArgs, gpu: &GpuClipper, hidden: bool) -> Result<Vec<Compared>, Failure> {
    let cases = args.cases.get() as u64;
    let bar = progress::count(cases, "verifying", hidden);
    let one = |number| {
        let case = TestCase::new(args.seed, number)?;
        let parameters = case.parameters()?;
        let verification = gradclip::verify(&case.clip, &case.gradients(&parameters)?, gpu).wait()?;
        bar.inc(1);
        Ok(Compared { clip: format!("{number}: {:.2}", case.clip), verification })
    };
    (0..cases).map(one).collect()
}

impl Compared {
    fn row(&self) -> String {
        let v = &self.verification;
        let disagreement = disagreement(v).map(|what| format!("    {what}\n")).unwrap_or_default();
        let verdict = if v.agrees() { "agree" } else { "DIFFER" };
        // A text that is too long for the column gets a line of its own, or two.
        let comma = self.clip.match_indices(',').take_while(|(i, _)| *i < 80).last();
        let clip = match (self.clip.len(), comma) {
            (..=54, _) => format!("{:<54}", self.clip),
            (81.., Some((comma, _))) => {
                let (first, rest) = self.clip.split_at(comma + 1);
                format!("{first}\n   {rest}\n{:54}", "")
            }
            _ => format!("{}\n{:54}", self.clip, ""),
        };
        format!("{clip} {:>10.1e} {:>5}  {verdict}\n{disagreement}", v.norm_error, ulps(v.worst_ulps))
    }

    fn json(&self) -> Value {
        let v = &self.verification;
        let tolerated: Map<_, _> = v.tolerated.iter().map(|t| (t.dtype.to_string(), t.ulps.into())).collect();
        let mismatch = v.first_mismatch.as_ref();
        json!({
            "clip": self.clip,
            "norm_error": v.norm_error,
            "norm_tolerance": v.norm_tolerance,
            "worst_ulps": v.worst_ulps,
            "tolerated_ulps": tolerated,
            "agrees": v.agrees(),
            "first_mismatch": mismatch.map(|m| json!({
                "tensor": m.name, "index": m.index, "cpu": m.cpu, "gpu": m.gpu, "ulps": m.ulps,
            })),
        })
    }
}

#[cfg(test)]
mod tests {
    use gradclip::NonFiniteElements;

    use super::*;

    /// Alters real verifications, because devices that compute wrongly are rare.
    #[test]
    fn a_mismatch_is_reported_and_ends_with_4() {
        let gpu =
            backend::open_gpu(None, None).expect("a Vulkan device: apt-get install mesa-vulkan-drivers libvulkan1");
        let tensors = [Tensor::new(&[3.0f32, 4.0]).named("w")];
        let mut compared = verify_file(&tensors, &clips_for(&tensors).unwrap(), &gpu, true).unwrap();
        assert!(report(&compared, "card", false, true).is_ok());
        assert_eq!(disagreement(&compared[0].verification), None);

        compared[0].verification.norm_error = 0.5;
        assert_eq!(disagreement(&compared[0].verification).unwrap(), "norm: CPU 5, GPU 5");
        let found = compared[1].verification.gpu.as_mut().unwrap();
        found.non_finite = gpu_found(&gpu);
        let message = disagreement(&compared[1].verification).unwrap();
        assert!(message.contains("CPU none, GPU 1 non-finite element"), "{message}");

        for json in [false, true] {
            let failure = report(&compared, "card", json, true).unwrap_err();
            assert_eq!((failure.exit_code(), failure.to_string().contains("2 of 11 clips on card")), (4, true));
        }
        assert!(compared[0].row().contains("DIFFER\n    norm: CPU 5"), "{}", compared[0].row());
        assert_eq!(compared[1].json()["agrees"], false);
    }

    fn gpu_found(gpu: &GpuClipper) -> Option<NonFiniteElements> {
        let clip = crate::description::measuring(Clip::norm(1.0));
        gradclip::verify(&clip, &[Tensor::new(&[f32::NAN])], gpu).wait().unwrap().gpu.unwrap().non_finite
    }
}
