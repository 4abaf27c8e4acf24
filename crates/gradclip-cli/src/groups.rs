//! Groups of gradients by name, each with a threshold of its own: `--group PATTERN=MAX`. What no group takes is one more group,
//! clipped by the command's own threshold. Without that option it is the only one.

use gradclip::{Clip, ClipReport, Mode, Tensor, TensorMut};

use crate::args::ClipOptions;
use crate::failure::Failure;
use crate::selection::fits;

/// The groups, and which tensor is in which.
#[derive(Debug)]
pub(crate) struct Groups {
    /// The patterns, in order, each with its clip.
    named: Vec<(String, Clip)>,
    /// The clip of the rest.
    pub(crate) rest: Clip,
}

/// The report on one group.
#[derive(Debug)]
pub(crate) struct GroupReport {
    pub(crate) name: String,
    pub(crate) report: ClipReport,
}

impl ClipOptions {
    /// The groups of a clip.
    pub(crate) fn groups(&self, clip: Clip) -> Result<Groups, Failure> {
        let with_threshold = |(pattern, max): &(String, f64)| {
            let mut clip = clip;
            match &mut clip.mode {
                Mode::Norm(own) | Mode::Rms(own) | Mode::AverageNorm(own) | Mode::Agc(own) => *own = *max,
                mode => *mode = Clip::value(*max).mode,
            }
            match clip.check() {
                Ok(()) => Ok((pattern.clone(), clip)),
                Err(error) => Err(Failure::Usage(format!("--group {pattern:?}: {error}"))),
            }
        };
        Ok(Groups { named: self.groups.iter().map(with_threshold).collect::<Result<_, _>>()?, rest: clip })
    }
}

impl From<Clip> for Groups {
    fn from(clip: Clip) -> Self {
        Self { named: Vec::new(), rest: clip }
    }
}

impl Groups {
    /// The clips, the last of them that of the rest.
    pub(crate) fn clips(&self) -> impl Iterator<Item = Clip> {
        self.named.iter().map(|(_, clip)| *clip).chain([self.rest])
    }

    /// The number of the group that takes a tensor: the first whose pattern fits, or the rest.
    pub(crate) fn of(&self, name: &str) -> usize {
        self.named.iter().position(|(pattern, _)| fits(name, pattern)).unwrap_or(self.named.len())
    }

    /// How many of these gradients each group takes.
    pub(crate) fn counts<'n>(&self, names: impl Iterator<Item = &'n str>) -> Vec<usize> {
        let mut counts = vec![0; self.named.len() + 1];
        names.for_each(|name| counts[self.of(name)] += 1);
        counts
    }

    /// Checks that each pattern takes a gradient, so that nobody relies on one that does not.
    pub(crate) fn check(&self, counts: &[usize]) -> Result<(), Failure> {
        match self.named.iter().zip(counts).find(|(_, count)| **count == 0) {
            None => Ok(()),
            Some(((pattern, _), _)) => Err(Failure::Usage(format!(
                "--group {pattern:?}: no gradient in the files has this name, or earlier groups take all that have it"
            ))),
        }
    }

    /// Divides tensors among the groups; each group keeps their order.
    pub(crate) fn divide<T: Named>(&self, tensors: impl IntoIterator<Item = T>) -> Vec<Vec<T>> {
        let mut divided: Vec<_> = self.clips().map(|_| Vec::new()).collect();
        for tensor in tensors {
            let group = self.of(tensor.name());
            divided[group].push(tensor);
        }
        divided
    }

    /// The report on all groups together, and that on each if there are several. `tensors` are those of this process, in
    /// the order in which they were divided.
    pub(crate) fn report(&self, tensors: &[Tensor<'_>], reports: Vec<ClipReport>) -> (ClipReport, Vec<GroupReport>) {
        let mut all = reports[0].clone();
        if let [_] = reports[..] {
            return (all, Vec::new());
        }
        all.total_norm = self.total_norm(&reports);
        let least = |least: f64, coef: f64| if least.is_nan() || coef >= least { least } else { coef };
        all.clip_coef = reports.iter().map(|report| report.clip_coef).fold(1.0, least);
        all.clipped = reports.iter().any(|report| report.clipped);
        all.elements = reports.iter().map(|report| report.elements).sum();
        let lost = reports.iter().filter_map(|report| report.lost);
        all.lost = lost.reduce(|mut all, lost| {
            (all.zero, all.infinite) = (all.zero + lost.zero, all.infinite + lost.infinite);
            all
        });
        all.non_finite = None;
        for found in reports.iter().filter_map(|report| report.non_finite.as_ref()) {
            match &mut all.non_finite {
                Some(first) => first.count += found.count,
                none => *none = Some(found.clone()),
            }
        }
        let numbers = self.divide(tensors.iter().enumerate());
        let segments = reports.iter().zip(&numbers).flat_map(|(report, numbers)| {
            report.segments.iter().map(|segment| {
                let mut segment = *segment;
                segment.tensor = segment.tensor.map(|tensor| numbers[tensor].0);
                segment
            })
        });
        all.segments = segments.collect();
        all.segments.sort_by_key(|segment| (segment.tensor, segment.index));
        let names = self.named.iter().map(|(pattern, _)| pattern.clone()).chain(["rest".into()]);
        let each = names.zip(reports).map(|(name, report)| GroupReport { name, report });
        // Nothing may be left for the rest.
        (all, each.filter(|group| group.report.elements > 0).collect())
    }

    /// N over the gradients of all groups.
    fn total_norm(&self, reports: &[ClipReport]) -> f64 {
        let divisor = |elements: u64| match self.rest.mode {
            Mode::Rms(_) => (elements.max(1) as f64).sqrt(),
            Mode::AverageNorm(_) => elements.max(1) as f64,
            _ => 1.0,
        };
        let norms: Vec<_> = reports.iter().map(|report| report.total_norm * divisor(report.elements)).collect();
        norm_of_norms(&norms, self.rest.norm_type.power()) / divisor(reports.iter().map(|report| report.elements).sum())
    }
}

/// The p-norm of all elements together, from the p-norms of parts.
pub(crate) fn norm_of_norms(norms: &[f64], p: f64) -> f64 {
    let (sum, largest) = (norms.iter().sum::<f64>(), norms.iter().copied().fold(0.0, f64::max));
    if sum.is_nan() {
        f64::NAN
    } else if largest == 0.0 || largest.is_infinite() || p.is_infinite() {
        largest
    } else {
        largest * norms.iter().map(|norm| (norm / largest).powf(p)).sum::<f64>().powf(1.0 / p)
    }
}

/// A tensor with a name.
pub(crate) trait Named {
    fn name(&self) -> &str;
}

impl Named for Tensor<'_> {
    fn name(&self) -> &str {
        Tensor::name(self).unwrap_or_default()
    }
}

impl Named for TensorMut<'_> {
    fn name(&self) -> &str {
        TensorMut::name(self).unwrap_or_default()
    }
}

impl Named for (usize, &Tensor<'_>) {
    fn name(&self) -> &str {
        Named::name(self.1)
    }
}

/// A clip that is decided for all groups.
#[derive(Debug)]
pub(crate) struct Decided {
    /// By group.
    pub(crate) clips: Vec<gradclip::DecidedClip>,
    /// The group of each tensor, and its place in it.
    places: Vec<(usize, usize)>,
}

impl Decided {
    /// `tensors` are those that were divided among the groups.
    pub(crate) fn new(groups: &Groups, tensors: &[Tensor<'_>], clips: Vec<gradclip::DecidedClip>) -> Self {
        let mut counts = vec![0; clips.len()];
        let place = |tensor: &Tensor<'_>| {
            let group = groups.of(Named::name(tensor));
            counts[group] += 1;
            (group, counts[group] - 1)
        };
        Self { places: tensors.iter().map(place).collect(), clips }
    }

    /// What is decided of a tensor, and its place there.
    pub(crate) fn of(&self, tensor: usize) -> (&gradclip::DecidedClip, usize) {
        let (group, place) = self.places[tensor];
        (&self.clips[group], place)
    }
}
