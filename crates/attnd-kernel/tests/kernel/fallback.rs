//! Which arithmetic a call runs in: none falls back to another one unless its caller decided so.

use std::panic::{AssertUnwindSafe, catch_unwind};

use attnd_kernel::slot::{N_SLOTS, Node};
use attnd_kernel::{
    Causal, Compute, GroupCall, Isa, KERNEL_ID, Kernels, Operator, Side, Storage, attend_node,
};

use crate::cases::{Case, Data, differing_bits};
use crate::dots::{MODES, case_of, kernels_with};

#[test]
fn kernels_without_dot_products_compute_in_f32_and_say_so() {
    for (compute, storage) in MODES {
        let case = case_of(1, Data::Normal, Causal::BottomRight, [2, 5, 700, 40, 24], (compute, storage));
        let in_f32 = Case {
            compute: Compute::F32,
            ..case_of(1, Data::Normal, Causal::BottomRight, [2, 5, 700, 40, 24], (compute, storage))
        };
        for kernels in Kernels::available().into_iter().filter(|kernels| kernels.isa() != Isa::Avx512) {
            let effective = kernels.effective(compute, storage).unwrap();
            assert_eq!((effective.compute(), effective.instead_of()), (Compute::F32, Some(compute)));
            assert_eq!(effective.to_string(), format!("f32 (no {compute} dot products here)"));
            assert_eq!(effective.kernel_id(), KERNEL_ID, "partials of both orders have different names");
            assert_eq!(differing_bits(&in_f32.attend(kernels, 0..5), &case.attend(kernels, 0..5)), None);
        }
        for other in [Storage::F32, Storage::F16] {
            let error = Kernels::available()[0].effective(compute, other).unwrap_err().to_string();
            assert!(
                error.contains(&format!("compute={compute} needs")) && error.contains(&other.to_string()),
                "{error}"
            );
        }
    }
    let ids = Compute::ALL.map(Compute::kernel_id);
    assert_eq!(ids, ["c1-f32", "c1-bf16", "c1-int8"]);
}

#[test]
fn kernels_refuse_an_arithmetic_that_others_have() {
    for (compute, storage) in MODES {
        let Some(with) = kernels_with(compute, storage) else { continue };
        let case = case_of(1, Data::Normal, Causal::None, [1, 1, 10, 4, 4], (compute, storage));
        let kv = case.resident(0..N_SLOTS);
        let effective = with.effective(compute, storage).unwrap();
        assert_eq!((effective.instead_of(), effective.kernel_id()), (None, compute.kernel_id()));
        let call = GroupCall {
            shape: case.shape,
            operator: &Operator::plain(1.0, Causal::None),
            group: 0,
            q: &case.q,
            kv: &kv,
            side: Side::default(),
            compute: effective,
        };
        for without in Kernels::available().into_iter().filter(|kernels| kernels.isa() != Isa::Avx512) {
            let attend = AssertUnwindSafe(|| attend_node(without, &call, Node::ROOT, 0..1));
            let panic = catch_unwind(attend).unwrap_err();
            let text = panic.downcast_ref::<String>().unwrap();
            assert!(text.contains(&format!("f32 (no {compute} dot products here)")), "{text}");
        }
    }
}
