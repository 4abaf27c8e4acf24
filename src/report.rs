//! What a clip tells about itself.

/// The outcome of one clip.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ClipReport {
    /// N over all gradients, whatever the scope, as the mode defines it ([`Clip`](crate::Clip) has the table): divided by
    /// `grad_scale`, before anything was clipped. NaN or infinite if a gradient is, except under
    /// [`NonFinite::Drop`](crate::NonFinite::Drop), which measures the rest. NaN for a value clip, which measures no
    /// norm.
    pub total_norm: f64,
    /// The factor c that gradients were multiplied by, beside `1 / grad_scale`; the smallest of all segments, NaN if one
    /// is. 1 when nothing was clipped, and for a value clip.
    pub clip_coef: f64,
    /// Whether there was anything to clip: the norm of a segment exceeded its threshold (by less than a rounding,
    /// `clip_coef` may still be 1), a segment became 0 or NaN, or an element lay outside the bounds of a value clip.
    /// Dividing by `grad_scale` alone, or dropping non-finite elements, does not count.
    pub clipped: bool,
    /// How many elements were measured.
    pub elements: u64,
    /// The NaN and infinite elements, if there were any.
    pub non_finite: Option<NonFiniteElements>,
    /// Each segment of a scope other than [`Scope::Global`](crate::Scope::Global), in the order of the tensors, and of
    /// the units or examples within them. Empty under `Global`, where the totals say it all.
    pub segments: Vec<SegmentReport>,
}

impl ClipReport {
    /// Whether a gradient was NaN or infinite: what mixed-precision training asks before it takes a step, and lowers the
    /// loss scale by. PyTorch calls it `found_inf`.
    #[must_use]
    pub fn has_non_finite(&self) -> bool {
        self.non_finite.is_some()
    }

    /// How many segments were clipped.
    #[must_use]
    pub fn num_clipped(&self) -> usize {
        self.segments.iter().filter(|segment| segment.clipped).count()
    }
}

/// What became of one segment.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SegmentReport {
    /// The place of its tensor in the list; None for an example over all tensors.
    pub tensor: Option<usize>,
    /// Which unit or example of its tensor, or of all, it is; None for a whole tensor.
    pub index: Option<u64>,
    /// N, as the mode defines it.
    pub norm: f64,
    /// c.
    pub clip_coef: f64,
    /// Whether it was clipped.
    pub clipped: bool,
}

/// What a tensor holds beside ordinary numbers: [`Tensor::counts`](crate::Tensor::counts).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorCounts {
    /// How many elements are 0 or -0.
    pub zeros: u64,
    /// How many are NaN or infinite.
    pub non_finite: u64,
    /// Where the first of these is.
    pub first_non_finite: Option<u64>,
}

/// How many elements are NaN or infinite, and where the first one is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NonFiniteElements {
    /// How many there are in all tensors.
    pub count: u64,
    /// The first process of a group that holds one; None outside a group ([`processes`](crate::processes)).
    pub rank: Option<u32>,
    /// The first tensor that holds one, by its place in the list of that process.
    pub tensor: usize,
    /// That tensor's name, if it has one.
    pub name: Option<String>,
    /// The first such element in that tensor, counted from 0 in memory order.
    pub index: u64,
}

impl std::fmt::Display for NonFiniteElements {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.count == 1 { "" } else { "s" };
        let tensor = crate::error::tensor_label(self.name.as_deref(), self.tensor);
        write!(f, "{} non-finite element{plural}, the first at index {} of {tensor}", self.count, self.index)?;
        self.rank.map_or(Ok(()), |rank| write!(f, " on rank {rank}"))
    }
}
