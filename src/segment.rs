//! Segments: which elements share a norm and a coefficient, and each segment's threshold. Both backends use this one
//! description: a scope makes each tensor one matrix or several, whose rows or columns are consecutive segments.

use std::hash::{Hash, Hasher};
use std::ops::Range;

use crate::decision::{Action, Known, Outcome};
use crate::error::tensor_label;
use crate::magnitude::Magnitude;
use crate::tensor::Spec;
use crate::{Budget, Clip, Error, Scope, UnitAxis};

/// How the elements of a matrix, in row-major order, belong to segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// All elements belong to one segment.
    Whole,
    /// Each row is a segment.
    Rows,
    /// Each column is a segment.
    Columns,
}

/// The segments of one matrix of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentLayout {
    pub(crate) by: By,
    /// The length of a row; the whole length for [`By::Whole`].
    pub(crate) columns: u64,
    /// The matrix's first segment.
    pub(crate) segment: u32,
    /// The place of the matrix's first element in the tensor: whole rows come before it.
    pub(crate) first: u64,
}

impl SegmentLayout {
    /// The segment of an element of the tensor.
    pub(crate) fn segment_of(&self, element: u64) -> u32 {
        let step = match self.by {
            By::Whole => 0,
            By::Rows => (element - self.first) / self.columns,
            By::Columns => element % self.columns,
        };
        // `Segments::new` allows fewer than 2^32 segments.
        self.segment + step as u32
    }

    /// Whether these elements of the tensor are left as they are, given the outcomes of all segments.
    fn leaves(&self, outcomes: &[Outcome], elements: Range<u64>) -> bool {
        let Range { start, end } = elements;
        let is_left = |segment: u32| outcomes[segment as usize].action == Action::Leave;
        match self.by {
            _ if start >= end => true,
            By::Whole | By::Rows => (self.segment_of(start)..=self.segment_of(end - 1)).all(is_left),
            By::Columns => (start..end.min(start + self.columns)).all(|i| is_left(self.segment_of(i))),
        }
    }
}

/// The segments of one tensor: matrices of one size, one after another. Adjacent axes that number segments, or that do
/// not, count as one, so that the two kinds take turns. The last two are the matrix. The others number the matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matrices {
    /// The first matrix.
    pub(crate) matrix: SegmentLayout,
    /// Elements in each.
    len: u64,
    /// The size of each axis before the matrix's own, and how many segments lie between its steps.
    outer: Vec<(u64, u32)>,
}

impl Matrices {
    /// The matrices of a tensor of `len` elements. `axes` holds the size of each axis, and whether it numbers segments. It is
    /// empty afterwards, for the next tensor.
    fn new(len: u64, axes: &mut Vec<(u64, bool)>, segment: u32) -> Self {
        axes.retain(|(size, _)| len > 0 && *size > 1);
        axes.dedup_by(|next, last| {
            let same = next.1 == last.1;
            if same {
                last.0 *= next.0;
            }
            same
        });
        let (by, columns, of_matrix, mut step) = match axes[..] {
            [.., (rows, true), (columns, false)] => (By::Rows, columns, rows * columns, rows),
            [.., (rows, false), (columns, true)] => (By::Columns, columns, rows * columns, columns),
            [(rows, true)] => (By::Rows, 1, rows, rows),
            _ => (By::Whole, len, len, 1),
        };
        axes.truncate(axes.len().saturating_sub(2));
        let mut outer = Vec::new();
        for (size, numbers) in axes.drain(..).rev() {
            outer.push((size, if numbers { step as u32 } else { 0 }));
            step *= if numbers { size } else { 1 };
        }
        outer.reverse();
        Self { matrix: SegmentLayout { by, columns, segment, first: 0 }, len: of_matrix, outer }
    }

    /// The matrices that hold these elements of the tensor, each with those that it holds. Never none.
    pub(crate) fn within(&self, elements: Range<u64>) -> impl Iterator<Item = (SegmentLayout, Range<u64>)> {
        let (Range { start, end }, len) = (elements, self.len.max(1));
        // Most tensors are one matrix, and a division is slow.
        let number_of = |element| if element < len { 0 } else { element / len };
        (number_of(start)..=number_of(end.saturating_sub(1).max(start))).map(move |i| {
            let matrix = self.number(i);
            (matrix, start.max(matrix.first)..end.min(matrix.first + len))
        })
    }

    /// Matrix number `i`.
    fn number(&self, i: u64) -> SegmentLayout {
        let (mut rest, mut segment) = (i, self.matrix.segment);
        for (size, step) in self.outer.iter().rev() {
            segment += (rest % size) as u32 * step;
            rest /= size;
        }
        SegmentLayout { segment, first: i * self.len, ..self.matrix }
    }

    /// Whether these elements of the tensor are left as they are, given the outcomes of all segments.
    pub(crate) fn leaves(&self, outcomes: &[Outcome], elements: Range<u64>) -> bool {
        self.within(elements).all(|(matrix, elements)| matrix.leaves(outcomes, elements))
    }
}

/// The size of each axis, and whether it numbers units.
fn unit_axes(axis: UnitAxis, t: Spec<'_>) -> Result<impl Iterator<Item = (u64, bool)>, String> {
    let sizes = t.sizes();
    let rank = sizes.len();
    let numbers: Vec<bool> = match axis {
        UnitAxis::First => (0..rank).map(|i| rank > 1 && i == 0).collect(),
        UnitAxis::Last => (0..rank).map(|i| rank > 1 && i + 1 == rank).collect(),
        UnitAxis::Optax => match rank {
            _ if sizes.iter().filter(|size| **size != 1).count() < 2 => vec![false; rank],
            2 | 3 => (0..rank).map(|i| i > 0).collect(),
            4 | 5 => (0..rank).map(|i| i + 1 == rank).collect(),
            _ => return Err(format!("its shape is {}; Optax has units for up to 5 dimensions", t.shape_text())),
        },
        UnitAxis::Axes(axes) | UnitAxis::Over(axes) => {
            if let Some(lacking) = axes.outside(rank).filter(|_| rank > 0) {
                return Err(format!("its shape is {}, which has no axis {lacking}", t.shape_text()));
            }
            (0..rank).map(|i| axes.has(i, rank) == matches!(axis, UnitAxis::Axes(_))).collect()
        }
    };
    Ok(sizes.into_iter().zip(numbers))
}

/// Consecutive segments with the same properties.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Family {
    first: u32,
    count: u32,
    /// Elements in each.
    pub(crate) elements: u64,
    /// The segment's share of the threshold.
    pub(crate) share: f64,
    /// The tensor that the segments belong to; None if they span all tensors.
    tensor: Option<usize>,
    /// Whether each segment is one unit or one example.
    indexed: bool,
}

/// The segments of a list of tensors.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Segments {
    /// One for each tensor.
    pub(crate) layouts: Vec<Matrices>,
    families: Vec<Family>,
    pub(crate) count: u32,
}

impl Segments {
    /// The segments of a clip. Every use of a clip calls this, because it checks the clip and the shapes.
    ///
    /// # Errors
    /// Those of [`Clip::check`]; [`Error::Tensor`] if a tensor has no such segments; [`Error::Limit`] from 2^32
    /// segments on.
    pub(crate) fn new<'a>(
        clip: &Clip,
        tensors: impl ExactSizeIterator<Item = Spec<'a>> + Clone,
    ) -> Result<Self, Error> {
        clip.check()?;
        let (count, all) = (tensors.len(), move || tensors.clone());
        let label = |i: usize| tensor_label(all().nth(i).and_then(|t| t.name), i);
        let fail = |i: usize, reason: String| Err(Error::Tensor { tensor: label(i), reason });
        let scope = clip.scope;
        let examples = if matches!(scope, Scope::Example | Scope::ExampleTensor) {
            let mut examples = None;
            for (i, t) in all().enumerate() {
                let Some(first) = t.first() else {
                    return fail(i, "it is a scalar, and has no dimension 0 to take examples along".into());
                };
                let (of, known) = *examples.get_or_insert((i, first));
                if first != known {
                    let other = label(of);
                    return fail(i, format!("its dimension 0 holds {first} examples, that of {other} {known}"));
                }
            }
            examples.map_or(0, |(_, count)| count)
        } else {
            0
        };
        let total: u64 = all().map(Spec::counted_len).sum();
        let mut found = Self { layouts: Vec::with_capacity(count), families: Vec::new(), count: 0 };
        let mut axes = Vec::new();
        for (i, t) in all().enumerate() {
            match scope {
                Scope::Global | Scope::Tensor => axes.push((t.len, false)),
                Scope::Example | Scope::ExampleTensor => {
                    axes.extend([(examples, true), (t.len.checked_div(examples).unwrap_or(0), false)]);
                }
                Scope::Unit => axes.extend(
                    unit_axes(t.unit_axis.or(clip.unit_axis).unwrap_or_default(), t)
                        .map_err(|reason| Error::Tensor { tensor: label(i), reason })?,
                ),
            }
            let numbering = || axes.iter().filter(|(_, numbers)| *numbers).map(|(size, _)| *size);
            // Where one is 0 there are none, even if the product of the others overflows.
            let segments = if numbering().any(|size| size == 0) { 0 } else { numbering().fold(1, u64::saturating_mul) };
            let share = match (scope, clip.budget) {
                (Scope::ExampleTensor, Budget::Uniform) => (1.0 / count as f64).sqrt(),
                (Scope::ExampleTensor, Budget::Sized) if t.counted_len() > 0 => {
                    (t.counted_len() as f64 / total as f64).sqrt()
                }
                _ => 1.0,
            };
            let shared = matches!(scope, Scope::Global | Scope::Example);
            let first = if shared {
                if i == 0 {
                    let elements = if scope == Scope::Global { total } else { total / examples.max(1) };
                    found.add(segments, elements, 1.0, None, scope == Scope::Example)?;
                }
                0
            } else {
                let first = found.count;
                let elements = t.counted_len().checked_div(segments).unwrap_or(0);
                let indexed = numbering().next().is_some();
                found.add(segments, elements, share, Some(i), indexed)?;
                first
            };
            found.layouts.push(Matrices::new(t.len, &mut axes, first));
        }
        if count == 0 && scope == Scope::Global {
            // The norm of nothing is 0.
            found.add(1, 0, 1.0, None, false)?;
        }
        Ok(found)
    }

    fn add(
        &mut self,
        count: u64,
        elements: u64,
        share: f64,
        tensor: Option<usize>,
        indexed: bool,
    ) -> Result<(), Error> {
        let limit = u64::from(u32::MAX);
        let end = u64::from(self.count).saturating_add(count);
        if end > limit {
            return Err(Error::too_large("the number of segments", end, limit));
        }
        let (first, count) = (self.count, count as u32);
        self.families.push(Family { first, count, elements, share, tensor, indexed });
        self.count = end as u32;
        Ok(())
    }

    /// Hashes what tells segments apart, which processes must have in common. How many elements each has may differ.
    pub(crate) fn describe(&self, digest: &mut impl Hasher) {
        for Family { first, count, tensor, indexed, .. } in &self.families {
            (first, count, tensor, indexed).hash(digest);
        }
    }

    /// Sets the number of elements of each segment, over all processes together.
    pub(crate) fn set_elements(&mut self, clip: &Clip, elements: &[u64]) {
        for family in &mut self.families {
            // All segments of a family have the same length on each process, so they have it over all processes too.
            family.elements = elements.get(family.first as usize).copied().unwrap_or(0);
        }
        if (clip.scope, clip.budget) == (Scope::ExampleTensor, Budget::Sized) {
            let total: u64 = self.families.iter().map(|family| family.elements).sum();
            for family in self.families.iter_mut().filter(|family| family.elements > 0) {
                family.share = (family.elements as f64 / total as f64).sqrt();
            }
        }
    }

    /// The number of elements in all segments.
    pub(crate) fn elements(&self) -> u64 {
        self.families.iter().map(|family| u64::from(family.count) * family.elements).sum()
    }

    /// Each segment in order, with its family.
    pub(crate) fn families(&self) -> impl Iterator<Item = &Family> {
        self.families.iter().flat_map(|family| std::iter::repeat_n(family, family.count as usize))
    }

    /// The threshold on the measured norm of each segment. `parameters` are the norms of the parameters and
    /// `thresholds` those of an adaptive threshold; either is empty if there are none.
    pub(crate) fn max_norms(&self, clip: &Clip, parameters: &[Magnitude], thresholds: &[f64]) -> Vec<Magnitude> {
        let of = |(i, family): (usize, &Family)| {
            let parameter = parameters.get(i).copied().unwrap_or(Magnitude::plain(0.0));
            let own = clip.max_norm(family.elements, family.share, parameter);
            // An adaptive threshold applies to N, as the report gives it.
            let adaptive = thresholds.get(i).copied().unwrap_or(f64::INFINITY);
            own.min(Magnitude::of(adaptive, |t| t / clip.weight(family.elements)))
        };
        self.families().enumerate().map(of).collect()
    }

    /// The measured norm of everything above which the step is skipped.
    #[cfg(feature = "gpu")]
    pub(crate) fn skip_above(&self, clip: &Clip) -> Magnitude {
        Magnitude::of(clip.skip_above, |x| x / clip.weight(self.elements()))
    }

    /// The outcome of each segment: see [`Clip::outcome`].
    pub(crate) fn outcomes(
        &self,
        clip: &Clip,
        known: &[Known],
        max_norms: &[Magnitude],
        refused: bool,
    ) -> Vec<Outcome> {
        let of = |((family, known), max_norm): ((&Family, &Known), &Magnitude)| {
            clip.outcome(*known, *max_norm, clip.weight(family.elements), refused)
        };
        self.families().zip(known).zip(max_norms).map(of).collect()
    }

    /// For each segment its tensor, and its unit or example.
    pub(crate) fn places(&self) -> impl Iterator<Item = (Option<usize>, Option<u64>)> {
        self.families.iter().flat_map(|f| (0..f.count).map(|i| (f.tensor, f.indexed.then_some(u64::from(i)))))
    }

    /// The name of each segment in messages and saved states.
    pub(crate) fn labels<'a>(&self, name_of: impl Fn(usize) -> Option<&'a str>) -> Vec<String> {
        let label = |place| match place {
            (None, None) => "all tensors".into(),
            (None, Some(i)) => format!("example {i}"),
            (Some(t), None) => tensor_label(name_of(t), t),
            (Some(t), Some(i)) => format!("{} at {i}", tensor_label(name_of(t), t)),
        };
        self.places().map(label).collect()
    }
}

/// Checks clips, and that those of one call share the loss scale and the policy for non-finite gradients.
///
/// # Errors
/// [`Error::Usage`], and those of [`Clip::check`]
pub(crate) fn check_groups<'a>(mut clips: impl Iterator<Item = &'a Clip> + Clone) -> Result<(), Error> {
    clips.clone().try_for_each(Clip::check)?;
    let key = |clip: &Clip| (clip.grad_scale, clip.non_finite);
    match clips.next() {
        Some(first) if clips.any(|clip| key(clip) != key(first)) => {
            Err(Error::usage("the clips of one call must share grad_scale and the non-finite policy"))
        }
        _ => Ok(()),
    }
}

/// Checks that a gradient comes with its parameter, if the clip needs parameters.
///
/// # Errors
/// [`Error::Tensor`], which names the gradient, number `i`.
pub(crate) fn check_parameter(i: usize, gradient: Spec<'_>, parameter: Option<Spec<'_>>) -> Result<(), Error> {
    let reason = match (gradient.name, parameter) {
        (_, None) => "the clip or the optimizer needs its parameter; give it with parameter(..)".into(),
        (_, Some(other)) if !gradient.has_shape_of(other) => {
            format!("its shape is {}, but that of its parameter is {}", gradient.shape_text(), other.shape_text())
        }
        (Some(name), Some(Spec { name: Some(other), .. })) if name != other => {
            format!("it was given the parameter of {other:?}")
        }
        _ => return Ok(()),
    };
    Err(Error::Tensor { tensor: tensor_label(gradient.name, i), reason })
}

#[cfg(test)]
#[path = "tests/segment.rs"]
mod tests;
