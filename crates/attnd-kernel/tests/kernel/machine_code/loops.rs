//! The innermost loops of a function, and what they do in one iteration.

use std::collections::{HashMap, HashSet};

use super::listing::{Flow, Instruction};

/// What the multiply-adds of an innermost loop are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A register tile, or something as plain: loads and arithmetic.
    Tile,
    /// A register tile where only some lanes see the key: it compares positions.
    Edge,
    /// The exponential of a softmax: it rounds, and writes weights.
    Softmax,
    /// Reads and writes rows in memory, as a merge does: it scales one side before it adds the other.
    Stream,
}

/// An innermost loop with multiply-adds in it. Counts are of one iteration, all ways through it together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HotLoop {
    pub(crate) kind: Kind,
    /// Of vectors.
    pub(crate) multiply_adds: usize,
    /// Of one f32 from memory to all lanes.
    pub(crate) broadcasts: usize,
    /// 16-bit elements are widened; of a tile.
    pub(crate) widens: bool,
    /// Vectors that go to the stack or come from it.
    pub(crate) spills: usize,
    /// Vectors that go to memory elsewhere.
    pub(crate) stores: usize,
    pub(crate) instructions: usize,
    /// Of the first instruction.
    pub(crate) address: u64,
}

/// The innermost loops of a function with at least `least` multiply-adds, by address.
pub(crate) fn hot_loops(function: &[Instruction<'_>], least: usize) -> Vec<HotLoop> {
    let mut stack = vec!["%rsp", "sp"];
    if function.iter().any(Instruction::is_frame_set_up) {
        stack.extend(["%rbp", "x29"]);
    }
    let loops = Graph::new(function).innermost_loops();
    let bodies = loops.into_iter().map(|body| body.into_iter().map(|at| function[at]).collect::<Vec<_>>());
    let mut found: Vec<HotLoop> = bodies.map(|body| look_at(&body, &stack)).collect();
    found.retain(|found| found.multiply_adds >= least);
    found.sort_by_key(|found| found.address);
    found
}

fn look_at(body: &[Instruction<'_>], stack: &[&str]) -> HotLoop {
    let count = |is: &dyn Fn(&Instruction<'_>) -> bool| body.iter().filter(|i| is(i)).count();
    let broadcasts = count(&|i| i.is_broadcast());
    let stores = count(&|i| i.is_vector_store() && !i.is_vector_access(stack));
    let kind = if count(&|i| i.is_rounding()) > 0 {
        Kind::Softmax
    } else if count(&|i| i.is_comparison()) > 0 {
        Kind::Edge
    } else if stores > 0 && count(&|i| i.is_multiplication()) > 0 {
        Kind::Stream
    } else {
        Kind::Tile
    };
    HotLoop {
        kind,
        multiply_adds: count(&|i| i.is_multiply_add()),
        broadcasts,
        widens: kind == Kind::Tile && count(&|i| i.is_widening()) > 0,
        spills: count(&|i| i.is_vector_access(stack)),
        stores,
        instructions: body.len(),
        address: body[0].address,
    }
}

/// Which instruction follows which. A jump to where a register says may lead to any place that nothing else leads to.
struct Graph {
    after: Vec<Vec<usize>>,
    before: Vec<Vec<usize>>,
}

impl Graph {
    fn new(function: &[Instruction<'_>]) -> Self {
        let index: HashMap<u64, usize> = function.iter().enumerate().map(|(at, i)| (i.address, at)).collect();
        let none = vec![Vec::new(); function.len()];
        let mut graph = Self { after: none.clone(), before: none };
        let mut by_register = Vec::new();
        for (at, instruction) in function.iter().enumerate() {
            let next = (at + 1 < function.len()).then_some(at + 1);
            let (next, other) = match instruction.flow() {
                Flow::Next => (next, None),
                Flow::Branch(to) => (next, index.get(&to)),
                Flow::Jump(to) => (None, index.get(&to)),
                Flow::Anywhere => {
                    by_register.push(at);
                    (None, None)
                }
                Flow::Away => (None, None),
            };
            for to in next.into_iter().chain(other.copied()) {
                graph.connect(at, to);
            }
        }
        for (at, instruction) in function.iter().enumerate().skip(1) {
            if graph.before[at].is_empty() && instruction.is_padding() {
                for to in std::mem::take(&mut graph.after[at]) {
                    graph.before[to].retain(|from| *from != at);
                }
            } else if graph.before[at].is_empty() {
                for from in &by_register {
                    graph.connect(*from, at);
                }
            }
        }
        graph
    }

    fn connect(&mut self, from: usize, to: usize) {
        self.after[from].push(to);
        self.before[to].push(from);
    }

    /// Each as its instructions, ascending. A cycle that is left without the places where it is entered holds the loops
    /// inside it; one that holds none is innermost.
    fn innermost_loops(&self) -> Vec<Vec<usize>> {
        let mut innermost = Vec::new();
        let mut waiting = self.cycles(&(0..self.after.len()).collect::<Vec<_>>());
        while let Some(cycle) = waiting.pop() {
            let inside: HashSet<usize> = cycle.iter().copied().collect();
            let is_entered = |at: &usize| self.before[*at].iter().any(|from| !inside.contains(from));
            let mut rest: Vec<usize> = cycle.iter().copied().filter(|at| !is_entered(at)).collect();
            if rest.len() == cycle.len() {
                rest.remove(0);
            }
            let nested = self.cycles(&rest);
            if nested.is_empty() {
                innermost.push(cycle);
            } else {
                waiting.extend(nested);
            }
        }
        innermost
    }

    /// The strongly connected parts of some instructions that have a cycle, each ascending (Kosaraju's algorithm).
    fn cycles(&self, among: &[usize]) -> Vec<Vec<usize>> {
        let mut state: HashMap<usize, bool> = among.iter().map(|at| (*at, false)).collect();
        let mut finished = Vec::with_capacity(among.len());
        for start in among {
            let mut path = vec![(*start, 0)];
            if state.insert(*start, true) == Some(true) {
                continue;
            }
            while let Some((at, tried)) = path.last_mut() {
                match self.after[*at].get(*tried) {
                    Some(to) => {
                        *tried += 1;
                        if state.get(to) == Some(&false) {
                            state.insert(*to, true);
                            path.push((*to, 0));
                        }
                    }
                    None => {
                        finished.push(*at);
                        path.pop();
                    }
                }
            }
        }
        let mut cycles = Vec::new();
        for start in finished.into_iter().rev() {
            let mut part = Vec::new();
            let mut waiting = vec![start];
            while let Some(at) = waiting.pop() {
                if state.remove(&at).is_some() {
                    part.push(at);
                    waiting.extend(self.before[at].iter().filter(|from| state.contains_key(from)));
                }
            }
            if part.len() > 1 || part.iter().any(|at| self.after[*at].contains(at)) {
                part.sort_unstable();
                cycles.push(part);
            }
        }
        cycles
    }
}

#[cfg(test)]
mod tests {
    use super::super::listing::{Architecture, functions};
    use super::*;

    fn loops_of(listing: &str, architecture: Architecture) -> Vec<HotLoop> {
        let found = functions(listing, architecture, "tile_entry");
        assert_eq!(found.len(), 1);
        hot_loops(&found[0], 1)
    }

    /// Two rows by one vector, in a loop over tiles; the padding before the loop leads into it and is never run.
    const TILE: &str = "
0000000000001000 <other>:
    1000:\tvfmadd231ps %ymm0,%ymm1,%ymm2
    1005:\tjmp    1000 <other>

0000000000002000 <_ZN5crate4AVX210tile_entry17h0123456789abcdefE>:
    2000:\tsub    $0x40,%rsp
    2004:\tjmp    2010 <_ZN5crate4AVX210tile_entry17h0123456789abcdefE+0x10>
    2006:\tdata16 cs nopw 0x0(%rax,%rax,1)
    2010:\tvxorps %xmm2,%xmm2,%xmm2
    2014:\tvmovaps %ymm2,0x20(%rsp)
    2018:\tjmp    2024 <_ZN5crate4AVX210tile_entry17h0123456789abcdefE+0x24>
    201a:\tnopw   0x0(%rax,%rax,1)
    2020:\tinc    %rsi
    2024:\tvmovups (%rdi,%rsi,4),%ymm0
    2029:\tvbroadcastss (%rbp),%ymm1
    202f:\tvfmadd231ps %ymm0,%ymm1,%ymm2
    2034:\tvbroadcastss 0x4(%rbp),%ymm1
    203a:\tvfmadd231ps %ymm0,%ymm1,%ymm3        # 9999 <constant>
    203f:\tcmp    %rax,%rsi
    2042:\tjb     2020 <_ZN5crate4AVX210tile_entry17h0123456789abcdefE+0x20>
    2044:\tvmovups %ymm2,(%rcx)
    2049:\tvmovups %ymm3,0x20(%rcx)
    204e:\tdec    %rdx
    2051:\tjne    2010 <_ZN5crate4AVX210tile_entry17h0123456789abcdefE+0x10>
    2053:\tret
";

    const CLEAN: HotLoop = HotLoop {
        kind: Kind::Tile,
        multiply_adds: 2,
        broadcasts: 2,
        widens: false,
        spills: 0,
        stores: 0,
        instructions: 8,
        address: 0x2020,
    };

    #[test]
    fn a_tile_is_found_inside_the_loop_over_tiles() {
        assert_eq!(loops_of(TILE, Architecture::X86), [CLEAN]);
    }

    #[test]
    fn a_spilled_accumulator_is_found() {
        for (line, spills) in [
            ("vfmadd231ps %ymm0,%ymm1,%ymm2", "vfmadd213ps 0x20(%rsp),%ymm1,%ymm2"),
            ("vmovups (%rdi,%rsi,4),%ymm0", "vmovups (%rsp,%rsi,4),%ymm0"),
        ] {
            let spilled = TILE.replacen(&format!("2f:\t{line}"), &format!("2f:\t{spills}"), 1);
            let spilled = spilled.replacen(&format!("24:\t{line}"), &format!("24:\t{spills}"), 1);
            assert_eq!(loops_of(&spilled, Architecture::X86), [HotLoop { spills: 1, ..CLEAN }], "{spills}");
        }
        let both_ways = TILE.replace("203f:\tcmp    %rax,%rsi", "203f:\tvmovaps %ymm2,0x20(%rsp)");
        assert_eq!(loops_of(&both_ways, Architecture::X86), [HotLoop { spills: 1, ..CLEAN }]);
    }

    #[test]
    fn the_frame_pointer_counts_where_it_is_one() {
        let framed = TILE.replace("sub    $0x40,%rsp", "mov    %rsp,%rbp");
        assert_eq!(loops_of(&framed, Architecture::X86), [HotLoop { spills: 2, ..CLEAN }]);
    }

    #[test]
    fn accumulators_in_memory_that_is_not_the_stack_are_stores() {
        let stored = TILE.replace("203f:\tcmp    %rax,%rsi", "203f:\tvmovups %ymm2,0x20(%rcx)");
        assert_eq!(loops_of(&stored, Architecture::X86), [HotLoop { stores: 1, ..CLEAN }]);
    }

    #[test]
    fn other_loops_are_told_by_what_they_do() {
        let with = |instruction: &str| {
            let listing = TILE.replace("203f:\tcmp    %rax,%rsi", &format!("203f:\t{instruction}"));
            loops_of(&listing, Architecture::X86)
        };
        assert_eq!(with("vroundps $0x0,%ymm0,%ymm4"), [HotLoop { kind: Kind::Softmax, ..CLEAN }]);
        assert_eq!(with("vrndscaleps $0x0,%zmm0,%zmm4"), [HotLoop { kind: Kind::Softmax, ..CLEAN }]);
        assert_eq!(with("vcmpltps %zmm0,%zmm4,%k1{%k1}"), [HotLoop { kind: Kind::Edge, ..CLEAN }]);
        assert_eq!(with("vcvtph2ps %xmm4,%ymm4"), [HotLoop { widens: true, ..CLEAN }]);
        let scaled =
            TILE.replace("2024:\tvmovups (%rdi,%rsi,4),%ymm0", "2024:\tvmulps (%rdi,%rsi,4),%ymm1,%ymm0");
        let stored = scaled.replace("203f:\tcmp    %rax,%rsi", "203f:\tvmovups %ymm2,(%rcx)");
        let expected = HotLoop { kind: Kind::Stream, stores: 1, ..CLEAN };
        assert_eq!(loops_of(&stored, Architecture::X86), [expected]);
    }

    #[test]
    fn a_loop_that_is_left_in_the_middle_and_entered_by_a_table_is_one_loop() {
        let listing = "
0000000000002000 <tile_entry>:
    2000:\tnotrack jmp *%rax
    2003:\tvxorps %xmm2,%xmm2,%xmm2
    2004:\tjmp    2014 <tile_entry+0x14>
    2010:\tinc    %rsi
    2014:\tcmp    %rax,%rsi
    2016:\tjae    2010 <tile_entry+0x10>
    2018:\tvfmadd231ps (%rdi){1to16},%zmm1,%zmm2
    2020:\tcmp    %rcx,%rsi
    2022:\tjae    2010 <tile_entry+0x10>
    2024:\tvfmadd231ps 0x4(%rdi){1to16},%zmm1,%zmm2
    2028:\tdec    %rdx
    202a:\tje     2000 <tile_entry>
    202c:\tjmp    2010 <tile_entry+0x10>
";
        let expected = HotLoop { instructions: 10, address: 0x2010, ..CLEAN };
        assert_eq!(loops_of(listing, Architecture::X86), [expected]);
    }

    #[test]
    fn tiles_of_aarch64_are_found_and_their_spills() {
        let listing = "
0000000000002000 <_RNvNvCs0_5crate4NEON10tile_entry>:
    2000:\tstp\tx29, x30, [sp, #-32]!
    2004:\tmov\tx29, sp
    2008:\tldr\tq0, [x0], #16
    200c:\tldr\ts1, [x1], #4
    2010:\tfmla\tv2.4s, v0.4s, v1.s[0]
    2014:\tldr\tq3, [x8, x9]
    2018:\tfmla\tv3.4s, v0.4s, v1.s[0]
    201c:\tsubs\tx2, x2, #0x1
    2020:\tb.ne\t2008 <_RNvNvCs0_5crate4NEON10tile_entry+0x8>  // b.any
    2024:\tcbz\tx3, 2000 <_RNvNvCs0_5crate4NEON10tile_entry>
    2028:\tret
";
        let clean = HotLoop { instructions: 7, address: 0x2008, ..CLEAN };
        assert_eq!(loops_of(listing, Architecture::Aarch64), [clean]);
        for spill in ["str\tq3, [sp, #16]", "ldp\tq3, q4, [x29, #-32]", "ld1\t{v3.4s}, [sp]"] {
            let spilled = listing.replace("ldr\tq3, [x8, x9]", spill);
            let expected = HotLoop { spills: 1, ..clean };
            assert_eq!(loops_of(&spilled, Architecture::Aarch64), [expected], "{spill}");
        }
        let address = listing.replace("ldr\tq3, [x8, x9]", "ldr\tx3, [sp, #16]");
        assert_eq!(loops_of(&address, Architecture::Aarch64), [clean], "an address is no vector");
        let stored = listing.replace("ldr\tq3, [x8, x9]", "str\tq3, [x8, x9]");
        assert_eq!(loops_of(&stored, Architecture::Aarch64), [HotLoop { stores: 1, ..clean }]);
    }
}
