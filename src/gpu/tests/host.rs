//! Tests of `src/gpu/host.rs`.

use super::*;

/// Every byte of every tensor is in one run, runs do not overlap, and each begins where a kernel reads whole words.
#[test]
fn loads_hold_every_byte_once() {
    for longest in [16, 32, 48, 1024] {
        for lens in [&[][..], &[0, 0], &[1], &[16], &[17, 0, 2, 48], &[1000, 3, 5000, 16, 16], &[2; 100]] {
            let loads = pack(lens, longest);
            let mut seen = vec![0; lens.len()];
            for load in &loads {
                assert!(load.size > 0 && load.size <= longest && load.size % 16 == 0);
                let mut end = 0;
                for (i, run) in load.runs.iter().enumerate() {
                    assert!(run.offset >= end && run.offset % 16 == 0);
                    assert!(i == 0 || load.runs[i - 1].tensor < run.tensor);
                    assert_eq!(run.bytes.start, seen[run.tensor]);
                    assert!(run.bytes.start % 16 == 0 && !run.bytes.is_empty());
                    seen[run.tensor] = run.bytes.end;
                    end = run.offset + run.bytes.len();
                }
                assert!(end <= load.size);
            }
            assert_eq!(seen, lens);
            assert!(loads.iter().rev().skip(1).all(|load| load.size == longest), "a load that is not full");
        }
    }
}

#[test]
fn memory_that_ends_is_made_do_with() {
    let gpu = GpuClipper::open().wait().expect("these tests need a device, which may be a software one");
    let left = std::cell::Cell::new(5);
    let make = || {
        if left.get() == 0 {
            return Err(Error::OutOfMemory("made up".into()));
        }
        left.set(left.get() - 1);
        gpu.device.storage("test", 16, DOWNLOAD)
    };
    assert_eq!(as_many_as(3, make).expect("enough").len(), 3);
    left.set(5);
    assert_eq!(as_many_as(9, make).expect("some").len(), 4);
    left.set(1);
    assert_eq!(as_many_as(9, make).expect("one").len(), 1);
    assert!(matches!(as_many_as(9, make), Err(Error::OutOfMemory(_))));
    assert!(as_many_as(0, make).expect("none wanted").is_empty());
}
