use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;

/// Steps both, saving and loading one of them before each step.
fn keeps_on<T>(mut through: T, steps: u32)
where
    T: Threshold + Clone + PartialEq + Debug + Serialize + DeserializeOwned,
{
    let mut plain = through.clone();
    for norm in noise().take(steps as usize) {
        let text = serde_json::to_string(&through).expect("plain data");
        assert!(!text.contains("null"), "{text}");
        through = serde_json::from_str(&text).expect("just saved");
        assert_eq!(through, plain);
        // A tree of values keeps no order of fields.
        let tree = serde_json::to_value(&through).expect("plain data");
        assert_eq!(serde_json::from_value::<T>(tree).expect("just saved"), plain);
        let norm = norm * norm.powi(20);
        assert_eq!(through.max_norms(norm, &[norm]), plain.max_norms(norm, &[norm]));
    }
}

#[test]
fn a_loaded_state_goes_on_as_the_saved_one() {
    keeps_on(ZClip::new().warm_up(9).skip_above_z(7.0), 60);
    keeps_on(AutoClip::new().history(16), 60);
    let mut auto = AutoClip::new();
    for norm in noise().take(9) {
        auto.max_norm(norm);
    }
    keeps_on(auto.history(4), 9);
    let mut ada = AdaGc::new().warm_up(9);
    ada.bind(&["the norm".to_owned()]).expect("no state");
    keeps_on(ada, 60);
    keeps_on(AdaGc::new(), 3);
}

/// The bytes that earlier releases saved.
#[test]
fn the_form_of_version_1_stays() {
    fn stays<T>(state: &T, text: &str)
    where
        T: PartialEq + Debug + Serialize + DeserializeOwned,
    {
        assert_eq!(serde_json::to_string(state).expect("plain data"), text);
        assert_eq!(serde_json::from_str::<T>(text).expect("version 1"), *state);
    }
    let zclip = concat!(
        r#"{"version":1,"alpha":"0.5","z_threshold":"2.0","warm_up":2,"skip_above_z":"inf","#,
        r#""mean":"2.0","variance":"1.0","steps":2}"#
    );
    stays(&warm_zclip(), zclip);
    let without = zclip.replace(r#""skip_above_z":"inf","#, "");
    assert_eq!(serde_json::from_str::<ZClip>(&without).expect("a setting of its default"), warm_zclip());
    let mut auto = AutoClip::new().history(2);
    auto.max_norm(5.0);
    stays(&auto, r#"{"version":1,"percentile":"10.0","history":2,"warm_up":1,"steps":1,"norms":["5.0"]}"#);
    let mut ada = AdaGc::new();
    ada.max_norms(1.0, &[0.0, 1.0]);
    let adagc = concat!(
        r#"{"version":1,"lambda_rel":"1.04","lambda_abs":"1.0","beta":"0.99","warm_up":100,"steps":1,"#,
        r#""labels":["tensor 0","tensor 1"],"gammas":["inf","1.0"]}"#
    );
    stays(&ada, adagc);
}

/// The message of loading `state` with `from` replaced by `to`.
fn refusal<T>(state: &T, from: &str, to: &str) -> String
where
    T: Serialize + DeserializeOwned + Debug,
{
    let text = serde_json::to_string(state).expect("plain data");
    assert!(text.contains(from), "{text}");
    serde_json::from_str::<T>(&text.replace(from, to)).expect_err("a bad state").to_string()
}

#[test]
fn other_versions_are_refused() {
    for message in [
        refusal(&warm_zclip(), r#""version":1"#, r#""version":2"#),
        refusal(&AutoClip::new(), r#""version":1"#, r#""version":2"#),
        refusal(&warm_adagc(), r#""version":1"#, r#""version":2"#),
        // Even if such a version changed other fields too.
        refusal(&warm_zclip(), r#""version":1,"alpha""#, r#""version":2,"rate""#),
    ] {
        assert!(message.contains("version 2") && message.contains("reads version 1"), "{message}");
    }
    assert!(refusal(&warm_zclip(), r#""version":1,"#, "").contains("missing field `version`"));
}

#[test]
fn states_that_make_no_sense_are_refused() {
    let (z, ada) = (warm_zclip(), warm_adagc());
    let mut auto = AutoClip::new().history(2);
    auto.max_norm(5.0);
    for (message, part) in [
        (refusal(&z, r#""variance":"1.0""#, r#""variance":"-1""#), "its variance -1 after 2"),
        (refusal(&z, r#""mean":"2.0""#, r#""mean":"NaN""#), "its mean is NaN"),
        (refusal(&z, r#""mean":"2.0""#, r#""mean":"inf""#), "its mean is inf"),
        (refusal(&z, r#""mean":"2.0""#, r#""mean":2.0"#), "expected a string"),
        (refusal(&z, r#""mean":"2.0""#, r#""mean":"two""#), "is not a number"),
        (refusal(&z, r#""steps":2"#, r#""steps":0"#), "after 0 steps"),
        (refusal(&z, r#""alpha":"0.5""#, r#""alpha":"1.5""#), "alpha is 1.5; it must be"),
        (refusal(&z, r#""warm_up":2"#, r#""warm_up":0"#), "warm_up is 0; it must be"),
        (refusal(&auto, r#"["5.0"]"#, r#"["-5"]"#), "it holds a norm of -5"),
        (refusal(&auto, r#"["5.0"]"#, r#"["5","6"]"#), "2 norms after 1 steps"),
        (refusal(&auto, r#"["5.0"]"#, "[]"), "0 norms after 1 steps"),
        (refusal(&auto, r#""history":2"#, r#""history":0"#), "history is 0; it must be"),
        (refusal(&ada, r#"["0.75","1.0"]"#, r#"["0.75"]"#), "it holds 1 gammas of 2 tensors"),
        (refusal(&ada, r#"["0.75","1.0"]"#, r#"["0.75","0"]"#), r#"the gamma of tensor "b" is 0"#),
        (refusal(&ada, r#"["0.75","1.0"]"#, r#"["NaN","1"]"#), r#"the gamma of tensor "w" is NaN"#),
        (refusal(&ada, r#""steps":2"#, r#""steps":0"#), "after 0 steps"),
        (refusal(&ada, r#""beta":"0.5""#, r#""beta":"1""#), "beta is 1; it must be"),
    ] {
        assert!(message.contains(part), "{message}");
    }
}
