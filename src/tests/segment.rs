//! Tests of `src/segment.rs`.

use super::*;
use crate::Dtype;

fn specs<'a>(shapes: &[&'a [usize]]) -> Vec<Spec<'a>> {
    let spec = |shape: &&'a [usize]| {
        let len = shape.iter().product::<usize>() as u64;
        Spec { shape: Some(shape), ..Spec::new(Dtype::F32, len) }
    };
    shapes.iter().map(spec).collect()
}

fn segments(scope: Scope, shapes: &[&[usize]]) -> Segments {
    let clip = Clip::norm(2.0).scope(scope);
    Segments::new(&clip, specs(shapes).into_iter()).expect("valid")
}

/// The segment of each element.
fn segments_of(matrices: &Matrices, spec: Spec<'_>) -> Vec<u32> {
    let parts = matrices.within(0..spec.len);
    parts.flat_map(|(matrix, elements)| elements.map(move |i| matrix.segment_of(i))).collect()
}

#[test]
fn every_element_has_its_segment() {
    let shapes: [&[usize]; 3] = [&[2, 3], &[2], &[2, 2, 2]];
    let all = |scope, axis: Option<UnitAxis>| {
        let mut clip = Clip::norm(1.0).scope(scope);
        clip.unit_axis = axis;
        let found = Segments::new(&clip, specs(&shapes).into_iter()).expect("valid");
        let each: Vec<_> = found.layouts.iter().zip(specs(&shapes)).map(|(of, spec)| segments_of(of, spec)).collect();
        (each, found.families().map(|f| f.elements).collect::<Vec<_>>())
    };
    assert_eq!(all(Scope::Global, None), (vec![vec![0; 6], vec![0; 2], vec![0; 8]], vec![16]));
    assert_eq!(all(Scope::Tensor, None), (vec![vec![0; 6], vec![1; 2], vec![2; 8]], vec![6, 2, 8]));
    let rows = vec![vec![0, 0, 0, 1, 1, 1], vec![2, 2], vec![3, 3, 3, 3, 4, 4, 4, 4]];
    assert_eq!(all(Scope::Unit, None), (rows, vec![3, 3, 2, 4, 4]));
    let columns = vec![vec![0, 1, 2, 0, 1, 2], vec![3, 3], vec![4, 5, 4, 5, 4, 5, 4, 5]];
    assert_eq!(all(Scope::Unit, Some(UnitAxis::Last)), (columns, vec![2, 2, 2, 2, 4, 4]));
    let examples = vec![vec![0, 0, 0, 1, 1, 1], vec![0, 1], vec![0, 0, 0, 0, 1, 1, 1, 1]];
    assert_eq!(all(Scope::Example, None), (examples, vec![8, 8]));
    let both = vec![vec![0, 0, 0, 1, 1, 1], vec![2, 3], vec![4, 4, 4, 4, 5, 5, 5, 5]];
    assert_eq!(all(Scope::ExampleTensor, None), (both, vec![3, 3, 1, 1, 4, 4]));
}

#[test]
fn a_tensor_may_choose_its_own_units() {
    let shapes: [&[usize]; 3] = [&[2, 3], &[2, 3], &[3]];
    let mut specs = specs(&shapes);
    (specs[0].unit_axis, specs[2].unit_axis) = (Some(UnitAxis::Last), Some(UnitAxis::Last));
    let of = |scope| {
        let mut clip = Clip::norm(1.0).scope(scope);
        clip.unit_axis = (scope == Scope::Unit).then_some(UnitAxis::First);
        let found = Segments::new(&clip, specs.iter().copied()).expect("valid");
        found.layouts.iter().map(|matrices| matrices.matrix.by).collect::<Vec<_>>()
    };
    assert_eq!(of(Scope::Unit), [By::Columns, By::Rows, By::Whole]);
    assert_eq!(of(Scope::Global), [By::Whole; 3]);
}

#[test]
fn thresholds_are_shared_out() {
    let shapes: [&[usize]; 2] = [&[2, 3], &[2, 9]];
    let thresholds = |budget| {
        let clip = Clip::norm(2.0).scope(Scope::ExampleTensor).budget(budget);
        let found = Segments::new(&clip, specs(&shapes).into_iter()).expect("valid");
        found.max_norms(&clip, &[], &[]).into_iter().map(Magnitude::to_f64).collect::<Vec<_>>()
    };
    assert_eq!(thresholds(Budget::Each), [2.0; 4]);
    assert_eq!(thresholds(Budget::Uniform), [2.0 * 0.5f64.sqrt(); 4]);
    assert_eq!(thresholds(Budget::Sized), [1.0, 1.0, 2.0 * 0.75f64.sqrt(), 2.0 * 0.75f64.sqrt()]);
}

#[test]
fn nothing_and_empty_tensors_have_segments() {
    assert_eq!(segments(Scope::Global, &[]).count, 1);
    assert_eq!(segments(Scope::Tensor, &[]).count, 0);
    assert_eq!(segments(Scope::Example, &[&[0, 3]]).count, 0);
    // The shape decides: a process that holds no column of a matrix still has all its rows.
    assert_eq!(segments(Scope::Unit, &[&[0, 3], &[4, 0], &[0]]).count, 5);
    assert_eq!(segments(Scope::Unit, &[&[]]).count, 1);
}

/// Any axes of any shape: an element's segment is its place along the axes that number units, in row-major order.
#[test]
fn units_by_any_set_of_axes() {
    let shapes: [&[usize]; 9] =
        [&[], &[7], &[1], &[3, 4], &[2, 3, 4], &[2, 1, 3, 2], &[2, 3, 2, 3, 2], &[3, 2, 1, 1, 2], &[2, 2, 2, 2, 2, 2]];
    for shape in shapes {
        for chosen in 0..1usize << shape.len() {
            let axes: Vec<_> = (0..shape.len()).filter(|i| chosen >> i & 1 == 1).collect();
            let signed = |axis: &usize| *axis as isize - if axis % 2 == 1 { shape.len() as isize } else { 0 };
            let numbering: Vec<_> = axes.iter().map(signed).collect();
            let others: Vec<_> = (0..shape.len()).filter(|i| !axes.contains(i)).map(|i| signed(&i)).collect();
            let len = shape.iter().product::<usize>();
            let number = |i: usize| {
                let places = (0..shape.len()).map(|axis| i / shape[axis + 1..].iter().product::<usize>() % shape[axis]);
                places.enumerate().filter(|(i, _)| axes.contains(i)).fold(0, |n, (i, at)| n * shape[i] + at) as u32
            };
            let want: Vec<_> = (0..len).map(number).collect();
            let count = axes.iter().map(|i| shape[*i]).product::<usize>();
            for unit_axis in [UnitAxis::axes(&numbering), UnitAxis::over(&others)] {
                let clip = Clip::norm(1.0).scope(Scope::Unit).unit_axis(unit_axis);
                let spec = specs(&[shape])[0];
                let found = Segments::new(&clip, [spec].into_iter()).expect("valid");
                assert_eq!(segments_of(&found.layouts[0], spec), want, "{shape:?} by {unit_axis}");
                assert_eq!(found.count, count as u32);
                assert!(found.families().all(|f| f.elements == (len / count) as u64));
                // Of any part too.
                for start in 0..len as u64 {
                    for end in [start, start + 1, len as u64] {
                        let parts = found.layouts[0].within(start..end);
                        let of = |(matrix, part): (SegmentLayout, Range<u64>)| part.map(move |i| matrix.segment_of(i));
                        let of: Vec<_> = parts.flat_map(of).collect();
                        assert_eq!(of, want[start as usize..end as usize], "{shape:?} by {unit_axis}: {start}..{end}");
                    }
                }
            }
        }
    }
}
