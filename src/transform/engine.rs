//! The one script engine of the process: which packages it has, what it refuses, and where its limits lie.
//!
//! No `eval`, `import`, `sleep` or `timestamp`, no file, no clock but the record's own. Steps, depths and sizes of the
//! text are bounded here; time and memory are the guard's part.

use rhai::packages::{
    ArithmeticPackage, BasicArrayPackage, BasicFnPackage, BasicIteratorPackage, BasicMapPackage, BasicMathPackage,
    BasicStringPackage, BitFieldPackage, LogicPackage, MoreStringPackage, Package,
};
use rhai::{Array, Dynamic, Engine, EvalAltResult, FLOAT, INT, ImmutableString, OptimizationLevel, Position};

use super::{functions, guard};

/// What a host function answers.
pub(super) type Answer<T> = Result<T, Box<EvalAltResult>>;

/// The longest script, in bytes.
pub(super) const MAX_TEXT: usize = 64 << 10;

rhai::def_package! {
    /// What scripts may use of the language's library, in one module so that a function is found at the first look.
    pub(super) Library(module):
        ArithmeticPackage,
        BasicArrayPackage,
        BasicFnPackage,
        BasicIteratorPackage,
        BasicMapPackage,
        BasicMathPackage,
        BasicStringPackage,
        BitFieldPackage,
        LogicPackage,
        MoreStringPackage
    {}
}

/// An error that a script can catch.
pub(super) fn raise<T>(message: impl Into<ImmutableString>) -> Answer<T> {
    Err(EvalAltResult::ErrorRuntime(message.into().into(), Position::NONE).into())
}

/// Ends the run; a script cannot catch it. Why it ended stands in the run.
pub(super) fn end<T>() -> Answer<T> {
    Err(EvalAltResult::ErrorTerminated(Dynamic::UNIT, Position::NONE).into())
}

/// Builds the engine.
pub(super) fn build() -> Engine {
    let mut engine = Engine::new_raw();
    engine.register_global_module(Library::new().as_shared_module());
    engine.set_optimization_level(OptimizationLevel::None);
    engine.set_strict_variables(true);
    // The built-in comparisons answer `false` for values of different types; ours are asked first.
    engine.set_fast_operators(false);
    for symbol in ["eval", "import", "export"] {
        engine.disable_symbol(symbol);
    }
    engine.set_max_operations(guard::MAX_STEPS);
    engine.set_max_call_levels(24);
    engine.set_max_expr_depths(48, 24);
    engine.set_max_functions(128);
    engine.set_max_variables(256);
    engine.set_max_modules(0);
    engine.on_progress(|steps| guard::progress(steps).then_some(Dynamic::UNIT));
    engine.on_print(|text| tracing::debug!(target: "walflow::script", "{text}"));
    engine.on_debug(|text, _, place| tracing::debug!(target: "walflow::script", %place, "{text}"));
    comparisons(&mut engine);
    additions(&mut engine);
    bounded(&mut engine);
    functions::register(&mut engine);
    engine
}

/// Order between values of different types is an error, except between the two kinds of number.
fn comparisons(engine: &mut Engine) {
    macro_rules! compare {
        ($name:literal, $op:tt) => {
            engine.register_fn($name, |a: INT, b: INT| a $op b);
            engine.register_fn($name, |a: FLOAT, b: FLOAT| a $op b);
            engine.register_fn($name, |a: INT, b: FLOAT| float(a) $op b);
            engine.register_fn($name, |a: FLOAT, b: INT| a $op float(b));
            engine.register_fn($name, |a: ImmutableString, b: ImmutableString| a.as_str() $op b.as_str());
            engine.register_fn($name, |a: char, b: char| a $op b);
            engine.register_fn($name, |a: Dynamic, b: Dynamic| -> Answer<bool> {
                raise(format!("{} {} {} compares values of different types, or of a type that has no order",
                    kind(&a), $name, kind(&b)))
            });
        };
    }
    compare!("<", <);
    compare!("<=", <=);
    compare!(">", >);
    compare!(">=", >=);
}

#[expect(clippy::cast_precision_loss, reason = "as everywhere where an integer meets a float")]
const fn float(number: INT) -> FLOAT {
    number as FLOAT
}

/// A value's type, in the words of the docs.
pub(super) fn kind(value: &Dynamic) -> &'static str {
    match value.type_name() {
        "()" => "() (missing or null)",
        "string" => "text",
        "i64" => "integer",
        "f64" => "float",
        "array" => "array",
        "map" => "map",
        "bool" => "bool",
        "char" => "char",
        "Fn" => "function",
        _ => "value",
    }
}

/// A missing value does not vanish in a text.
fn additions(engine: &mut Engine) {
    const WHY: &str = "text + () (missing or null): test for it first, or use `??`";
    for name in ["+", "+="] {
        engine.register_fn(name, |_: &mut ImmutableString, (): ()| -> Answer<ImmutableString> { raise(WHY) });
    }
    engine.register_fn("+", |(): (), _: ImmutableString| -> Answer<ImmutableString> { raise(WHY) });
}

/// Functions of the library that make much out of little in one step, where the guard cannot look: ours ask it first.
fn bounded(engine: &mut Engine) {
    engine.register_fn("replace", |text: &mut ImmutableString, find: &str, with: &str| replace(text, find, with));
    engine.register_fn("replace", |text: &mut ImmutableString, find: char, with: &str| {
        replace(text, find.encode_utf8(&mut [0; 4]), with)
    });
    engine.register_fn("replace", |text: &mut ImmutableString, find: &str, with: char| {
        replace(text, find, with.encode_utf8(&mut [0; 4]))
    });
    engine.register_fn("pad", |text: &mut ImmutableString, len: INT, with: char| {
        pad(text, len, with.encode_utf8(&mut [0; 4]))
    });
    engine.register_fn("pad", |text: &mut ImmutableString, len: INT, with: &str| pad(text, len, with));
    engine.register_fn("pad", |array: &mut Array, len: INT, item: Dynamic| -> Answer<()> {
        let len = usize::try_from(len).unwrap_or(0);
        let more = len.saturating_sub(array.len());
        afford(more.saturating_mul(weight(&item)))?;
        if more > 0 {
            array.resize(len, item);
        }
        Ok(())
    });
    engine.register_fn("split", |text: &mut ImmutableString| pieces(text.split_whitespace()));
    engine.register_fn("split", |text: &mut ImmutableString, by: &str| pieces(text.split(by)));
    engine.register_fn("split", |text: &mut ImmutableString, by: char| pieces(text.split(by)));
    engine
        .register_fn("split", |text: &mut ImmutableString, by: &str, n: INT| pieces(text.splitn(at_least_one(n), by)));
    engine
        .register_fn("split", |text: &mut ImmutableString, by: char, n: INT| pieces(text.splitn(at_least_one(n), by)));
    engine.register_fn("split_rev", |text: &mut ImmutableString, by: &str| pieces(text.rsplit(by)));
    engine.register_fn("split_rev", |text: &mut ImmutableString, by: char| pieces(text.rsplit(by)));
    engine.register_fn("split_rev", |text: &mut ImmutableString, by: &str, n: INT| {
        pieces(text.rsplitn(at_least_one(n), by))
    });
    engine.register_fn("split_rev", |text: &mut ImmutableString, by: char, n: INT| {
        pieces(text.rsplitn(at_least_one(n), by))
    });
    engine.register_fn("to_chars", |text: &mut ImmutableString| -> Answer<Array> {
        afford(text.len().saturating_mul(size_of::<Dynamic>()))?;
        Ok(text.chars().map(Dynamic::from).collect())
    });
}

/// Ends the run when `bytes` more would be over its budget.
pub(super) fn afford(bytes: usize) -> Answer<()> {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    if guard::with_run(|run| run.affords(bytes)).unwrap_or(true) { Ok(()) } else { end() }
}

fn at_least_one(pieces: INT) -> usize {
    usize::try_from(pieces).unwrap_or(1).max(1)
}

fn replace(text: &mut ImmutableString, find: &str, with: &str) -> Answer<()> {
    if with.len() > find.len() {
        let matches = text.matches(find).count();
        afford(text.len().saturating_add(matches.saturating_mul(with.len().saturating_sub(find.len()))))?;
    }
    if !text.is_empty() {
        *text = text.replace(find, with).into();
    }
    Ok(())
}

fn pad(text: &mut ImmutableString, len: INT, with: &str) -> Answer<()> {
    let missing = usize::try_from(len).unwrap_or(0).saturating_sub(text.chars().count());
    if missing > 0 && !with.is_empty() {
        afford(missing.saturating_mul(4).saturating_add(text.len()))?;
        let mut padded = String::from(text.as_str());
        padded.extend(with.chars().cycle().take(missing));
        *text = padded.into();
    }
    Ok(())
}

/// How many pieces are made before the budget is asked again.
const ROUND: usize = 1_024;

fn pieces<'a>(mut parts: impl Iterator<Item = &'a str>) -> Answer<Array> {
    let mut array = Array::new();
    loop {
        let before = array.len();
        array.extend(parts.by_ref().take(ROUND).map(|piece| Dynamic::from(ImmutableString::from(piece))));
        if array.len() < before + ROUND {
            return Ok(array);
        }
        // The vector may double at its next push.
        afford(array.len().saturating_mul(2 * size_of::<Dynamic>()))?;
    }
}

/// The bytes that a value takes, near enough.
fn weight(value: &Dynamic) -> usize {
    let inner = if let Ok(text) = value.as_immutable_string_ref() {
        text.len()
    } else if let Ok(array) = value.as_array_ref() {
        array.iter().map(weight).sum()
    } else if let Ok(map) = value.as_map_ref() {
        map.iter().map(|(name, value)| 32 + name.len() + weight(value)).sum()
    } else {
        0
    };
    inner.saturating_add(size_of::<Dynamic>())
}
