//! Masks written down as lists, blocks and documents, and biases from tables: that they are the dense tensors they stand for, cost what they
//! see, and are refused where they make no sense.

use attnd_kernel::slot::{N_SLOTS, Node, slot_of_page};
use attnd_kernel::{
    AttnShape, Bias, Causal, Compute, Csr, Dims, Documents, Kernels, Mask, Operator, OperatorParts, Path,
    Positions, Relative, Run, Selection, Shift, Swin,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::check;
use super::request::{Request, random_csr, random_cuts, scattered_documents};
use crate::bits::random_sizes;
use crate::cases::{Case, Data};

/// Who sees what by lists alone, `[queries, keys]` of each head.
fn by_lists(request: &Request) -> Vec<Vec<bool>> {
    let (queries, keys) = (request.n_queries(), request.n_keys());
    let ids = |runs: &[Run]| -> Vec<u32> {
        let mut before = 0;
        runs.iter()
            .flat_map(|run| std::iter::repeat_n(run.id, run.end - std::mem::replace(&mut before, run.end)))
            .collect()
    };
    let documents = request.parts.mask.documents.as_ref();
    let documents = documents.map(|documents| (ids(&documents.queries()[0]), ids(&documents.keys()[0])));
    let of_head = |head: usize| {
        let sees = |i: usize, j: usize| {
            let document = documents.as_ref().is_none_or(|(queries, keys)| queries[i] == keys[j]);
            let blocks = request.parts.csr.as_ref().is_none_or(|csr| {
                let rows = csr.row_ptr().len() / csr.layouts();
                let layout = if csr.layouts() == 1 { 0 } else { head };
                let begin: u32 = (0..layout).map(|layout| csr.row_ptr()[(layout + 1) * rows - 1]).sum();
                let row = layout * rows + i / csr.query_block();
                let [from, to] = [row, row + 1].map(|row| (begin + csr.row_ptr()[row]) as usize);
                csr.columns()[from..to].contains(&u32::try_from(j / csr.key_block()).unwrap())
            });
            document && blocks
        };
        (0..queries * keys).map(|at| sees(at / keys, at % keys)).collect()
    };
    (0..request.group()).map(of_head).collect()
}

/// Lists have the bits of the dense masks that they stand for, on every ISA and cut anywhere.
#[test]
fn lists_are_the_masks_that_they_stand_for() {
    for seed in 0..80_u64 {
        let mut rng = SmallRng::seed_from_u64(9000 + seed);
        let sizes = random_sizes(&mut rng);
        let data = Data::ALL[seed as usize % Data::ALL.len()];
        let case = Case::new(seed, data, Causal::None, sizes);
        let mut lists = Request::new(case, OperatorParts::plain(0.3, Causal::None));
        let (heads, queries, keys) = (lists.group(), lists.n_queries(), lists.n_keys());
        if seed % 3 != 0 {
            let layouts = if rng.random() { 1 } else { heads };
            lists.parts.csr = Some(random_csr(&mut rng, layouts, queries, keys));
        }
        if seed % 3 != 1 {
            lists.parts.mask.documents = Some(scattered_documents(&mut rng, queries, keys).into());
        }
        let mut dense = lists.clone();
        dense.mask = by_lists(&lists);
        (dense.parts.csr, dense.parts.mask.documents) = (None, None);
        dense.parts.selection = Some(Selection::Dense);
        let what = format!("seed {seed} {data:?} {sizes:?} {:?}", lists.parts);
        let expected = dense.attend(Kernels::available()[0]);
        for kernels in Kernels::available() {
            check(&format!("{what} {}", kernels.isa()), &expected, &lists.attend(kernels));
        }
        let cuts = random_cuts(&mut rng);
        check(&format!("{what} {cuts:?}"), &expected, &lists.attend_cut(&Kernels::available(), &cuts));
    }
}

/// Pages that no list of a block's rows has keys in are not looked at: there is nothing resident but the ones that are seen.
#[test]
fn lists_cost_the_pages_that_they_see() {
    let keys = 40_000;
    for (queries, key_block, columns) in
        [(1, 1, vec![20 * 256 + 3]), (96, 1, vec![20 * 256, 20 * 256 + 255]), (200, 64, vec![81, 82])]
    {
        let case = Case::new(1, Data::Normal, Causal::None, [2, queries, keys, 16, 16]);
        let row_ptr: Vec<u32> = (0..=queries as u32).map(|row| row * columns.len() as u32).collect();
        let of_all: Vec<u32> = (0..queries).flat_map(|_| columns.clone()).collect();
        let csr = Some(Csr::new((1, key_block), 1, row_ptr.into(), of_all.into()).unwrap());
        let blocks = OperatorParts { csr, ..OperatorParts::plain(0.3, Causal::None) };
        let run = |end, id| Run { end, id };
        let of_keys = vec![run(5120, 0), run(5130, 1), run(5200, 0), run(5376, 1), run(keys, 0)];
        let documents = Documents::new(&[vec![run(queries, 1)]], &[of_keys]).unwrap();
        let mask = Mask { documents: Some(documents.into()), ..Mask::default() };
        let documents = OperatorParts { mask, ..OperatorParts::plain(0.3, Causal::None) };
        for parts in [blocks, documents] {
            let request = Request::new(case.clone(), parts);
            assert_eq!(request.operator().path(), Path::General);
            let slot = slot_of_page(20);
            for kernels in Kernels::available() {
                // Over all nodes, of which most aren't resident in the first.
                let seen = request.partial(kernels, &(slot..slot + 1), Node::ROOT, 0..queries);
                assert_eq!(seen, request.partial(kernels, &(0..N_SLOTS), Node::ROOT, 0..queries));
                assert!(seen.l.iter().all(|l| *l > 0.0));
            }
        }
    }
}

/// Tables have the bits of the dense biases that they stand for.
#[test]
fn tables_are_the_biases_that_they_stand_for() {
    for seed in 0..60_u64 {
        let mut rng = SmallRng::seed_from_u64(9500 + seed);
        let [group, mut tq, mut tk, d, dv] = random_sizes(&mut rng);
        let is_window = seed % 2 == 0;
        if is_window {
            tk = rng.random_range(1..=25) * rng.random_range(1..=20);
            tq = tk;
        }
        let case = Case::new(seed, Data::Normal, Causal::None, [group, tq, tk, d, dv]);
        let offset = rng.random_range(-400..400_i64);
        let positions = Some(Positions::Offset(attnd_kernel::PerBatch::Same(offset)));
        let mask = Mask { positions, ..Mask::default() };
        let mut table = Request::new(case, OperatorParts { mask, ..OperatorParts::plain(0.3, Causal::None) });
        let mut dense = table.clone();
        dense.parts.biases = vec![Bias::Dense];
        let element: Box<dyn Fn(usize, usize, usize) -> f32> = if is_window {
            let height = (1..=tk)
                .filter(|height| tk.is_multiple_of(*height))
                .max_by_key(|height| *height % 7)
                .unwrap();
            let width = tk / height;
            let numbers: Vec<f32> = (0..(2 * height - 1) * (2 * width - 1) * group)
                .map(|_| rng.random_range(-3.0..3.0))
                .collect();
            let regions: Vec<u32> = (0..tk).map(|_| rng.random_range(0..3)).collect();
            let shift = Some(Shift { regions: regions.as_slice().into(), between: -100.0 });
            table.parts.biases =
                vec![Bias::Swin(Swin { height, width, table: numbers.as_slice().into(), shift })];
            Box::new(move |head, i, j| {
                let down = i as isize / width as isize - j as isize / width as isize + height as isize - 1;
                let across = i as isize % width as isize - j as isize % width as isize + width as isize - 1;
                let entry = down as usize * (2 * width - 1) + across as usize;
                numbers[entry * group + head] + if regions[i] == regions[j] { 0.0 } else { -100.0 }
            })
        } else {
            let numbers: Vec<f32> = (0..32 * group).map(|_| rng.random_range(-3.0..3.0)).collect();
            let (distance, both) = (rng.random_range(20..300), rng.random());
            let relative = Relative::new(numbers.as_slice().into(), 32, distance, both).unwrap();
            table.parts.biases = vec![Bias::Relative(relative)];
            Box::new(move |head, i, j| {
                let ahead = j as i64 - (i as i64 + offset);
                let bucket =
                    attnd_kernel::reference::biases::relative_bucket(ahead, 32, distance as usize, both);
                numbers[bucket * group + head]
            })
        };
        let of_head = |head: usize| (0..tq * tk).map(|at| element(head, at / tk, at % tk)).collect();
        dense.bias = (0..group).map(of_head).collect();
        let what = format!("seed {seed} {:?}", table.parts);
        let expected = dense.attend(Kernels::available()[0]);
        for kernels in Kernels::available() {
            check(&format!("{what} {}", kernels.isa()), &expected, &table.attend(kernels));
        }
        let cuts = random_cuts(&mut rng);
        check(&format!("{what} {cuts:?}"), &expected, &table.attend_cut(&Kernels::available(), &cuts));
    }
}

/// Heads of the second batch element and of the second kv group have layouts, entries and windows of their own.
#[test]
fn lists_and_tables_are_those_of_the_groups_heads() {
    let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 6, keys: 6, head_dim: 4, value_dim: 5 };
    let shape = AttnShape::new(dims).unwrap();
    let case = Case::new(22, Data::Normal, Causal::None, [2, 6, 6, 4, 5]);
    let (kv, kernels) = (case.resident(0..N_SLOTS), Kernels::available()[0]);
    let mut rng = SmallRng::seed_from_u64(22);
    let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-2.0..2.0)).collect() };
    let (relative, swin) = (draw(8 * 4), draw(3 * 5 * 4));
    let regions: Vec<u32> = [[0, 0, 0, 0, 1, 1], [2, 1, 2, 1, 2, 1]].concat();
    // Each of the heads sees another key, or those of the second batch element do, too.
    for layouts in [1, 4, 8_usize] {
        let csr = |of: &[usize]| {
            let columns: Vec<u32> = of.iter().flat_map(|layout| [*layout as u32 % 5, 5]).collect();
            Csr::new((6, 1), of.len(), [0, 2].repeat(of.len()).into(), columns.into()).unwrap()
        };
        let parts = |heads: &[usize], layouts: &[usize], regions: &[u32]| {
            let columns = |table: &[f32]| -> Vec<f32> {
                table
                    .chunks(4)
                    .flat_map(|row| heads.iter().map(|head| row[*head]).collect::<Vec<_>>())
                    .collect()
            };
            let relative = Relative::new(columns(&relative).into(), 8, 20, true).unwrap();
            let shift = Some(Shift { regions: regions.into(), between: -1.5 });
            let swin = Swin { height: 2, width: 3, table: columns(&swin).into(), shift };
            OperatorParts {
                csr: Some(csr(layouts)),
                // Any order.
                biases: vec![Bias::Swin(swin), Bias::Relative(relative)],
                ..OperatorParts::plain(0.4, Causal::None)
            }
        };
        let all: Vec<usize> = (0..layouts).collect();
        let operator = Operator::new(parts(&[0, 1, 2, 3], &all, &regions), &shape).unwrap();
        for group in 0..4 {
            let call = attnd_kernel::GroupCall {
                shape,
                operator: &operator,
                group,
                q: &case.q,
                kv: &kv,
                side: attnd_kernel::Side::default(),
                compute: attnd_kernel::Effective::F32,
            };
            let got = attnd_kernel::attend_node(kernels, &call, Node::ROOT, 0..6).0;
            let (batch, heads) = (group / 2, [group % 2 * 2, group % 2 * 2 + 1]);
            let of_heads = heads.map(|head| (batch * 4 + head) % layouts);
            let alone = parts(&heads, &of_heads, &regions[batch * 6..][..6]);
            let alone = Request::new(case.clone(), alone).partial(kernels, &(0..N_SLOTS), Node::ROOT, 0..6);
            assert_eq!(got, alone, "{layouts} layouts, group {group}");
        }
    }
}

#[test]
fn lists_and_tables_that_make_no_sense_are_refused() {
    let shape = |batch, queries, keys| {
        let dims = Dims { batch, heads: 4, kv_heads: 2, queries, keys, head_dim: 4, value_dim: 5 };
        AttnShape::new(dims).unwrap()
    };
    let plain = || OperatorParts::plain(0.4, Causal::None);
    let with = |bias: Bias| OperatorParts { biases: vec![bias], ..plain() };
    let relative =
        |n: usize, buckets, distance, both| Relative::new(vec![1.0; n].into(), buckets, distance, both);
    for (refused, text) in [
        (relative(12, 3, 9, true), "bias.relative has 3 buckets, at least 4 are needed"),
        (relative(4, 1, 9, false), "bias.relative has 1 buckets, at least 2 are needed"),
        (relative(128, 32, 8, true), "bias.relative.max_distance is 8, 32 buckets count up to 8 one by one"),
        (
            relative(128, 32, 16, false),
            "bias.relative.max_distance is 16, 32 buckets count up to 16 one by one",
        ),
        (relative(127, 32, 128, true), "bias.relative.table has 127 numbers, no multiple of 32"),
        (relative(0, 32, 128, true), "bias.relative.table has 0 numbers, no multiple of 32"),
        (Relative::new([1.0, 2.0, f32::NAN, 4.0].into(), 4, 9, false), "bias.relative.table[2] is NaN"),
        (
            Relative::new([1.0, -3e38, 3.0, 4.0].into(), 4, 9, false),
            "bias.relative.table[1] is -300000000000000000000000000000000000000",
        ),
    ] {
        assert_eq!(refused.unwrap_err().to_string(), text);
    }
    let swin = |height, width, n: usize| Swin { height, width, table: vec![1.0; n].into(), shift: None };
    let shifted = |n: usize, between| {
        let shift = Some(Shift { regions: vec![0; n].into(), between });
        with(Bias::Swin(Swin { shift, ..swin(2, 3, 60) }))
    };
    let csr = |layouts: usize, rows: usize, columns: &[u32]| {
        let mut row_ptr = vec![0; rows + 1];
        row_ptr[rows] = columns.len() as u32;
        let columns = columns.repeat(layouts);
        let csr = Csr::new((2, 4), layouts, row_ptr.repeat(layouts).into(), columns.into()).unwrap();
        OperatorParts { csr: Some(csr), ..plain() }
    };
    let tables = || Bias::Relative(relative(128, 32, 128, true).unwrap());
    for (shape, parts, text) in [
        (
            shape(1, 6, 6),
            with(Bias::Relative(relative(96, 32, 128, true).unwrap())),
            "bias.relative.table has 96 numbers, 32 for each of 4 heads are needed",
        ),
        (
            shape(1, 3, 6),
            with(tables()),
            "bias.relative and no mask.positions: q_len 3, kv_len 6 can be aligned two ways",
        ),
        (
            shape(1, 6, 6),
            OperatorParts { biases: vec![tables(), tables()], ..plain() },
            "bias.relative twice",
        ),
        (
            shape(1, 3, 6),
            with(Bias::Swin(swin(2, 3, 60))),
            "bias.swin has windows of 2 * 3 tokens, q_len is 3",
        ),
        (
            shape(1, 6, 7),
            with(Bias::Swin(swin(2, 3, 60))),
            "bias.swin has windows of 2 * 3 tokens, kv_len is 7",
        ),
        (
            shape(1, 6, 6),
            with(Bias::Swin(swin(0, 3, 60))),
            "bias.swin has windows of 0 * 3 tokens, q_len is 6",
        ),
        (
            shape(1, 6, 6),
            with(Bias::Swin(swin(2, 3, 15))),
            "bias.swin.table has 15 numbers, 15 for each of 4 heads are needed",
        ),
        (
            shape(4, 6, 6),
            shifted(9, -100.0),
            "bias.swin.regions has 9 numbers, windows have 6 tokens, batch is 4",
        ),
        (
            shape(4, 6, 6),
            shifted(18, -100.0),
            "bias.swin.regions has 18 numbers, windows have 6 tokens, batch is 4",
        ),
        (shape(4, 6, 6), shifted(12, f32::INFINITY), "bias.swin.between is inf"),
        (shape(2, 6, 6), csr(2, 3, &[1]), "mask.csr has 2 layouts, num_heads is 4, batch is 2"),
        (shape(2, 6, 6), csr(8, 2, &[1]), "mask.csr has 2 rows of blocks, 6 queries in blocks of 2 have 3"),
        (shape(2, 6, 6), csr(4, 3, &[0, 2]), "mask.csr.columns[7] is 2, 6 keys in blocks of 4 have 2"),
    ] {
        assert_eq!(Operator::new(parts, &shape).unwrap_err().to_string(), text);
    }

    let run = |end, id| Run { end, id };
    let documents = Documents::new(&[vec![run(6, 1)]], &[vec![run(2, 1), run(4, 2), run(6, 1)]]).unwrap();
    let mask = Mask { documents: Some(documents.into()), ..Mask::default() };
    for (parts, option) in [
        (with(tables()), "bias.relative"),
        (with(Bias::Swin(swin(2, 3, 60))), "bias.swin"),
        (csr(8, 3, &[0, 1]), "mask.csr"),
        (OperatorParts { mask, ..plain() }, "mask.documents"),
    ] {
        let operator = Operator::new(parts, &shape(2, 6, 6)).unwrap();
        assert_eq!(operator.path(), Path::General);
        let refused = operator.check_compute(Compute::Int8).unwrap_err();
        assert_eq!(refused.to_string(), format!("compute=int8 and {option}"));
    }
}
