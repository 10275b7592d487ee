//! The register tiles as machine code: in the loops that the time goes into, accumulators stay in registers.
//!
//! A tile that needs a register too many still computes the right bits, and loses a tenth of the speed or more. No
//! benchmark runs in the tests, so this looks at the code instead: everything generic is inlined into one entry per ISA,
//! the test's own executable holds the entries that programs get, and a disassembler shows their loops. Needs no CPU that
//! could run them.

mod listing;
mod loops;

use std::io::Write as _;
use std::process::Command;

use self::listing::{Architecture, functions};
use self::loops::{HotLoop, Kind, hot_loops};

/// Fewer multiply-adds than in the smallest tile make no loop hot.
const LEAST: usize = 4;

/// A tile that must be there in full, as the loop that the compiler should make of it.
struct Tile {
    what: &'static str,
    multiply_adds: usize,
    /// `None` where multiply-adds take an element of a vector for all lanes, in several ways.
    broadcasts: Option<usize>,
    widens: bool,
    /// Loops: each of the two products is one at least.
    at_least: usize,
}

/// A tile of `mr` broadcasts by `registers` registers of lanes, `steps` of which make an iteration.
const fn tile(what: &'static str, mr: usize, registers: usize, steps: usize) -> Tile {
    let (multiply_adds, broadcasts) = (mr * registers * steps, mr * steps);
    Tile { what, multiply_adds, broadcasts: Some(broadcasts), widens: false, at_least: 2 }
}

/// The same for elements of 16 bits, or pairs of 8.
const fn widened(what: &'static str, mr: usize, registers: usize, steps: usize) -> Tile {
    Tile { widens: true, ..tile(what, mr, registers, steps) }
}

/// Loops that spill today, why, and how many vectors at most go to the stack or come from it in an iteration, or to memory of a
/// tile.
struct Allowance {
    of: fn(&HotLoop) -> bool,
    most: usize,
    stores: usize,
    why: &'static str,
}

/// What is expected of the entries of one ISA.
struct Expected {
    /// As the table of the entries is called.
    table: &'static str,
    /// The module that the table is in, if it isn't `dispatch` itself.
    module: Option<&'static str>,
    /// Measures what everything is held against; none where another does.
    peak: Option<&'static str>,
    /// Those with tiles.
    entries: &'static [&'static str],
    tiles: &'static [Tile],
    allowed: &'static [Allowance],
}

const SUMS: &str = "residue sums, whose number rule 4 fixes, the polynomial and its temporaries; the pass is bound by moving scores";

/// The entries with tiles that every ISA has.
const ENTRIES: &[&str] = &[
    "rows_f32_entry",
    "rows_f16_entry",
    "rows_bf16_entry",
    "rows_int8_entry",
    "rows_int4_entry",
    "attend_queries_entry",
];

const AVX512: Expected = Expected {
    table: "AVX512",
    module: None,
    peak: Some("fma_loop_entry"),
    entries: &[
        "rows_f32_entry",
        "rows_f32_ahead_entry",
        "rows_f16_entry",
        "rows_bf16_entry",
        "rows_int8_entry",
        "rows_int4_entry",
        "attend_queries_entry",
    ],
    tiles: &[
        tile("rows 6 x 4", 6, 4, 4),
        tile("queries 8 x 3", 8, 3, 4),
        tile("queries 8 x 2", 8, 2, 4),
        widened("rows 4 x 4 of 16 bits", 4, 4, 4),
    ],
    allowed: &[],
};

const AVX512_BF16: Expected = Expected {
    table: "AVX512_BF16",
    module: Some("dots"),
    peak: Some("dot_loop_entry"),
    entries: &["rows_dots_entry", "queries_dots_entry"],
    tiles: &[tile("rows 4 x 4", 4, 4, 4), tile("queries 8 x 3", 8, 3, 4), tile("queries 8 x 2", 8, 2, 4)],
    allowed: &[Allowance { of: |found| found.kind == Kind::Softmax, most: 22, stores: 0, why: SUMS }],
};

const AVX512_INT8: Expected = Expected {
    table: "AVX512_INT8",
    module: Some("dots"),
    peak: None,
    entries: &["rows_dots_entry"],
    tiles: &[widened("rows 4 x 4 of pairs", 4, 4, 2)],
    allowed: &[],
};

const AVX2: Expected = Expected {
    table: "AVX2",
    module: None,
    peak: Some("fma_loop_entry"),
    entries: ENTRIES,
    tiles: &[
        Tile { at_least: 4, ..tile("rows 6 x 1 and queries 6 x 1", 6, 2, 4) },
        tile("rows 1 x 4", 1, 8, 4),
        widened("rows 4 x 1 of 16 bits", 4, 2, 4),
    ],
    allowed: &[
        Allowance {
            of: |found| found.widens,
            most: 57,
            stores: 0,
            why: "eight accumulators, words, what is widened of them, scales, constants and a broadcast are more than 16 \
                 registers; the compiler also hoists broadcasts of later steps",
        },
        Allowance {
            of: |found| found.kind == Kind::Edge,
            most: 16,
            stores: 0,
            why: "the bounds of the lanes and what is selected; partial pages with values that are no numbers only",
        },
        Allowance { of: |found| found.kind == Kind::Softmax, most: 40, stores: 0, why: SUMS },
    ],
};

/// Loops over the scores of a row that need more registers than there are for what they compute.
const FUNCTIONS: &str =
    "polynomials of two registers at a time, whose constants are more than 16 registers hold beside them";

/// The entries of the general path with tiles or polynomials.
const GENERAL: &[&str] = &["scores_entry", "context_entry", "cap_entry", "softmax_entry", "sigmoids_entry"];

const AVX512_GENERAL: Expected = Expected {
    table: "AVX512",
    module: Some("general"),
    peak: None,
    entries: GENERAL,
    tiles: &[
        Tile { at_least: 1, ..tile("scores 6 x 4", 6, 4, 4) },
        Tile { at_least: 1, ..tile("context 4 x 4", 4, 4, 4) },
    ],
    allowed: &[],
};

const AVX2_GENERAL: Expected = Expected {
    table: "AVX2",
    module: Some("general"),
    peak: None,
    entries: GENERAL,
    tiles: &[tile("scores and context 6 x 1", 6, 2, 4)],
    allowed: &[Allowance { of: |found| found.kind == Kind::Softmax, most: 6, stores: 0, why: FUNCTIONS }],
};

/// The entries of reducers with tiles or polynomials.
const REDUCE: &[&str] = &["distance_entry", "leaky_entry", "tanh_entry", "direct_entry"];

const AVX512_REDUCE: Expected = Expected {
    table: "AVX512",
    module: Some("reduce"),
    peak: None,
    entries: REDUCE,
    tiles: &[
        Tile { at_least: 1, ..tile("distances 4 x 4", 4, 4, 1) },
        Tile { at_least: 1, multiply_adds: 32, ..tile("leaky sums 4 x 4", 4, 4, 2) },
        Tile { at_least: 1, broadcasts: Some(16), ..tile("pairs of tangents 4 x 2", 4, 2, 3) },
    ],
    allowed: &[Allowance {
        of: |found| found.kind == Kind::Tile && found.multiply_adds == 24,
        most: 6,
        stores: 0,
        why: "words of rows that the compiler broadcasts before it needs them; the divisions take longer",
    }],
};

const AVX2_REDUCE: Expected = Expected {
    table: "AVX2",
    module: Some("reduce"),
    peak: None,
    entries: REDUCE,
    tiles: &[
        Tile { at_least: 1, ..tile("distances 2 x 1", 2, 2, 1) },
        Tile { at_least: 1, ..tile("leaky sums 2 x 1", 2, 2, 2) },
        Tile { at_least: 1, broadcasts: Some(4), ..tile("pairs of tangents 1 x 1", 1, 2, 3) },
    ],
    allowed: &[
        Allowance { of: |found| found.kind == Kind::Softmax, most: 6, stores: 0, why: FUNCTIONS },
        Allowance {
            of: |found| found.multiply_adds == 8 && found.broadcasts == 12,
            most: 0,
            stores: 8,
            why: "sums of one tangent, of which no loop over elements is left: each is written",
        },
    ],
};

const UNTUNED: &str =
    "what the compiler makes of it; no machine with NEON has been measured, so nothing has been tuned";

const NEON: Expected = Expected {
    table: "NEON",
    module: None,
    peak: Some("fma_loop_entry"),
    entries: ENTRIES,
    tiles: &[Tile { at_least: 4, broadcasts: None, ..tile("rows 6 x 1 and queries 6 x 1", 6, 4, 4) }],
    allowed: &[
        Allowance { of: |found| found.widens, most: 80, stores: 0, why: UNTUNED },
        Allowance {
            of: |found| found.kind == Kind::Tile && found.multiply_adds > 12,
            most: 16,
            stores: 0,
            why: UNTUNED,
        },
        Allowance { of: |found| found.kind == Kind::Edge, most: 74, stores: 0, why: UNTUNED },
        Allowance { of: |found| found.kind == Kind::Softmax, most: 581, stores: 0, why: SUMS },
    ],
};

const NEON_GENERAL: Expected = Expected {
    table: "NEON",
    module: Some("general"),
    peak: None,
    entries: GENERAL,
    tiles: &[Tile { broadcasts: None, ..tile("scores and context 6 x 1", 6, 4, 4) }],
    allowed: &[
        Allowance {
            of: |found| found.kind == Kind::Tile && found.multiply_adds > 12,
            most: 16,
            stores: 0,
            why: UNTUNED,
        },
        Allowance { of: |found| found.kind == Kind::Softmax, most: 80, stores: 0, why: FUNCTIONS },
    ],
};

const NEON_REDUCE: Expected = Expected {
    table: "NEON",
    module: Some("reduce"),
    peak: None,
    entries: REDUCE,
    tiles: &[
        Tile { at_least: 1, broadcasts: None, ..tile("distances 2 x 1", 2, 4, 1) },
        Tile { at_least: 1, broadcasts: None, ..tile("leaky sums 2 x 1", 2, 4, 2) },
        Tile { at_least: 1, broadcasts: None, ..tile("pairs of tangents 1 x 1", 1, 4, 3) },
    ],
    allowed: &[Allowance { of: |found| found.kind == Kind::Softmax, most: 80, stores: 0, why: FUNCTIONS }],
};

#[test]
fn no_register_tile_spills() {
    let Some((architecture, listing)) = disassembled() else { return };
    let expected: &[Expected] = match architecture {
        Architecture::X86 => &[
            AVX512,
            AVX512_BF16,
            AVX512_INT8,
            AVX512_GENERAL,
            AVX512_REDUCE,
            AVX2,
            AVX2_GENERAL,
            AVX2_REDUCE,
        ],
        Architecture::Aarch64 => &[NEON, NEON_GENERAL, NEON_REDUCE],
    };
    let mut complaints = Vec::new();
    for expected in expected {
        complaints.extend(complaints_about(expected, architecture, &listing));
    }
    assert!(complaints.is_empty(), "\n  {}\n", complaints.join("\n  "));
}

/// What is wrong with the entries of one ISA.
fn complaints_about(expected: &Expected, architecture: Architecture, listing: &str) -> Vec<String> {
    let Expected { table, module, peak, entries, tiles, allowed } = expected;
    let hot_loops_of = |entry: &str| {
        // Both manglings write a name behind its length.
        let module = module.map_or_else(String::new, |module| format!("{}{module}", module.len()));
        let symbol = format!("8dispatch{module}{}{table}{}{entry}", table.len(), entry.len());
        let found = functions(listing, architecture, &symbol);
        assert_eq!(found.len(), 1, "functions whose symbol contains {symbol}: were symbols stripped?");
        hot_loops(&found[0], LEAST)
    };
    let mut complaints = Vec::new();
    let found: Vec<HotLoop> = entries.iter().flat_map(|entry| hot_loops_of(entry)).collect();
    for Tile { what, multiply_adds, broadcasts, widens, at_least } in *tiles {
        let whole = found.iter().filter(|found| {
            found.kind == Kind::Tile
                && (found.multiply_adds, found.widens) == (*multiply_adds, *widens)
                && broadcasts.is_none_or(|broadcasts| found.broadcasts == broadcasts)
        });
        let loops = whole.count();
        if loops < *at_least {
            let each = format!("{multiply_adds} multiply-adds and {broadcasts:?} broadcasts");
            let shapes: Vec<_> = found
                .iter()
                .filter(|found| found.kind == Kind::Tile)
                .map(|found| (found.multiply_adds, found.broadcasts, found.widens))
                .collect();
            complaints.push(format!(
                "{table}, {what}: {loops} loops of {each}, where there must be {at_least}; there are {shapes:?}"
            ));
        }
    }
    // Edges are the other family's.
    let has_edges = entries.iter().any(|entry| entry.contains("queries"));
    for kind in [Kind::Edge, Kind::Softmax].into_iter().filter(|kind| *kind != Kind::Edge || has_edges) {
        if !found.iter().any(|found| found.kind == kind) {
            complaints.push(format!("{table}: no loop was recognised as {kind:?}"));
        }
    }
    for found in found {
        let allowance = allowed.iter().find(|allowance| (allowance.of)(&found));
        let (most, stores, why) = allowance
            .map_or((0, 0, "none is allowed"), |allowance| (allowance.most, allowance.stores, allowance.why));
        if found.spills > most || found.kind == Kind::Tile && found.stores > stores {
            let at = found.address;
            complaints.push(format!("{table}, {at:x}: {found:?}; spills allowed: {most}, {why}"));
        }
    }
    // What everything is measured against: multiply-adds and a counter.
    if let Some(entry) = peak {
        let peak = hot_loops_of(entry);
        let is_peak =
            |found: &HotLoop| found.spills == 0 && 4 * found.multiply_adds >= 3 * found.instructions;
        if peak.len() != 1 || !peak.iter().all(is_peak) {
            complaints.push(format!("{table}: this is no calibration loop: {peak:?}"));
        }
    }
    complaints
}

/// This executable as a disassembler shows it. Where that says nothing about speed or can't be had, `None`, and why on
/// stderr past the test harness's capture.
fn disassembled() -> Option<(Architecture, String)> {
    let skipped = |why: &str| {
        let _written = writeln!(std::io::stderr(), "SKIPPED: spills in the register tiles, because {why}");
        None
    };
    let architecture = match std::env::consts::ARCH {
        "x86_64" => Architecture::X86,
        "aarch64" => Architecture::Aarch64,
        other => return skipped(&format!("no expectations are written for {other}")),
    };
    if cfg!(debug_assertions) {
        return skipped("this build is not optimised");
    }
    let executable = std::env::current_exe().expect("the path of this executable");
    // The second one is for tests that run under an emulator.
    for tool in ["objdump", "aarch64-linux-gnu-objdump"] {
        let listed =
            Command::new(tool).args(["--disassemble", "--no-show-raw-insn"]).arg(&executable).output();
        if let Some(output) = listed.ok().filter(|output| output.status.success()) {
            return Some((architecture, String::from_utf8_lossy(&output.stdout).into_owned()));
        }
    }
    skipped("`objdump` is missing or doesn't know this architecture")
}
