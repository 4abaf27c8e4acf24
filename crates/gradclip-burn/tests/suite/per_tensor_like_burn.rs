//! Guards against semantics that differ from burn's where they mean the same: its own per-tensor clip as a live oracle.
//! Tensors are small, because burn's norm of large ones is wrong on llvmpipe.

use burn::grad_clipping::GradientClippingConfig;
use burn::module::Module;
use burn::module::{ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use gradclip_burn::GradClipper;
use gradclip_burn::gradclip::{Clip, Scope};

use crate::common::{Net, Random, all_numbers, assert_close, devices, gradients, rounded};

struct ByBurn<'a> {
    grads: &'a mut GradientsParams,
    config: GradientClippingConfig,
}

impl ModuleVisitor for ByBurn<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.grads.remove::<D>(param.id).expect("each has one");
        self.grads.register(param.id, self.config.init().clip_gradient(gradient));
    }
}

#[test]
fn per_tensor_clips_agree_with_burns_own() {
    let per_tensor = Clip::norm(1.5).eps(0.0).scope(Scope::Tensor);
    let pairs =
        [(per_tensor, GradientClippingConfig::Norm(1.5)), (Clip::value(0.5), GradientClippingConfig::Value(0.5))];
    for (name, device) in devices() {
        let net = Net::new(&device);
        for seed in 0..5 {
            for (clip, config) in &pairs {
                let mut random = Random(seed);
                let fill = |_: usize, n: usize| {
                    let scale = random.normal().exp();
                    rounded(&random.normals(n).iter().map(|x| x * scale).collect::<Vec<_>>())
                };
                let mut ours = gradients(&net, &device, DType::F32, fill);
                let given = all_numbers(&net, &ours);
                let mut each = given.iter();
                let mut burns = gradients(&net, &device, DType::F32, |_, _| each.next().expect("as many").clone());
                GradClipper::new(*clip).clip(&mut ours, &net).expect("finite");
                net.visit(&mut ByBurn { grads: &mut burns, config: config.clone() });
                for (ours, burns) in all_numbers(&net, &ours).iter().zip(all_numbers(&net, &burns)) {
                    assert_close(ours, &burns, 2e-6, &format!("{name} {config:?}"));
                }
            }
        }
    }
}
