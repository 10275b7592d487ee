//! What a disassembler prints, as instructions: GNU objdump's listings of x86-64 (AT&T syntax) and aarch64.

/// The instruction set that a listing is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    X86,
    Aarch64,
}

/// One line of a listing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction<'a> {
    architecture: Architecture,
    pub(crate) address: u64,
    pub(crate) mnemonic: &'a str,
    pub(crate) operands: &'a str,
}

/// Where control goes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// To the next one; calls too, which come back.
    Next,
    /// To an address or to the next one.
    Branch(u64),
    /// To an address.
    Jump(u64),
    /// To where a register says.
    Anywhere,
    /// Out of the function.
    Away,
}

/// The instructions of each function whose symbol contains `name`.
pub(crate) fn functions<'a>(
    listing: &'a str,
    architecture: Architecture,
    name: &str,
) -> Vec<Vec<Instruction<'a>>> {
    let mut found: Vec<Vec<Instruction<'a>>> = Vec::new();
    let mut inside = false;
    for line in listing.lines() {
        if let Some(header) = line.strip_suffix(">:") {
            inside = header.contains(name);
            if inside {
                found.push(Vec::new());
            }
        } else if inside
            && let (Some(function), Some(instruction)) = (found.last_mut(), instruction(line, architecture))
        {
            function.push(instruction);
        }
    }
    found
}

/// `1234:`, a tab, `mnemonic operands # comment`.
fn instruction(line: &str, architecture: Architecture) -> Option<Instruction<'_>> {
    let (address, code) = line.split_once(':')?;
    let address = u64::from_str_radix(address.trim(), 16).ok()?;
    let code = code.split(" # ").next()?.split("\t// ").next()?.trim();
    let (mnemonic, operands) = code.split_once(char::is_whitespace).unwrap_or((code, ""));
    Some(Instruction { architecture, address, mnemonic, operands: operands.trim() })
}

impl Instruction<'_> {
    pub(crate) fn flow(&self) -> Flow {
        let is = |names: &[&str]| names.contains(&self.mnemonic);
        let (jumps, branches, leaves) = match self.architecture {
            Architecture::X86 => {
                (is(&["jmp", "notrack"]), self.mnemonic.starts_with('j'), is(&["ret", "ud2", "int3"]))
            }
            Architecture::Aarch64 => {
                let tests = is(&["cbz", "cbnz", "tbz", "tbnz"]);
                (is(&["b", "br"]), tests || self.mnemonic.starts_with("b."), is(&["ret", "udf", "brk"]))
            }
        };
        match self.target() {
            Some(target) if jumps => Flow::Jump(target),
            Some(target) if branches => Flow::Branch(target),
            _ if jumps => Flow::Anywhere,
            _ if leaves => Flow::Away,
            _ => Flow::Next,
        }
    }

    /// Fills the space before an aligned loop.
    pub(crate) fn is_padding(&self) -> bool {
        ["nop", "nopw", "nopl", "data16", "cs", "xchg"].contains(&self.mnemonic)
    }

    /// The address before `<symbol+offset>`.
    fn target(&self) -> Option<u64> {
        let address = self.operands.split('<').next()?.split([' ', ',']).rfind(|word| !word.is_empty())?;
        u64::from_str_radix(address.trim_start_matches("0x"), 16).ok()
    }

    /// A fused multiply-add of whole vectors of f32.
    pub(crate) fn is_multiply_add(&self) -> bool {
        match self.architecture {
            Architecture::X86 => {
                ["vdpbf16ps", "vpdpwssd"].contains(&self.mnemonic)
                    || self.mnemonic.ends_with("ps")
                        && ["vfmadd", "vfmsub", "vfnmadd", "vfnmsub"]
                            .iter()
                            .any(|f| self.mnemonic.starts_with(f))
            }
            Architecture::Aarch64 => {
                ["fmla", "fmls"].contains(&self.mnemonic) && self.operands.contains(".4s")
            }
        }
    }

    /// Multiplies whole vectors of f32, without adding.
    pub(crate) fn is_multiplication(&self) -> bool {
        match self.architecture {
            Architecture::X86 => self.mnemonic == "vmulps",
            Architecture::Aarch64 => self.mnemonic == "fmul" && self.operands.contains(".4s"),
        }
    }

    /// Copies one f32 from memory into all lanes, or uses it as if.
    pub(crate) fn is_broadcast(&self) -> bool {
        match self.architecture {
            Architecture::X86 => {
                // Words of several elements are broadcast as integers.
                self.mnemonic == "vbroadcastss"
                    || self.mnemonic == "vpbroadcastd" && self.operands.contains('(')
                    || self.operands.contains("{1to")
            }
            Architecture::Aarch64 => {
                self.mnemonic == "ld1r" || self.is_multiply_add() && self.operands.contains(".s[")
            }
        }
    }

    /// Rounds to integers, as only a softmax does.
    pub(crate) fn is_rounding(&self) -> bool {
        match self.architecture {
            Architecture::X86 => ["vrndscaleps", "vroundps"].contains(&self.mnemonic),
            Architecture::Aarch64 => self.mnemonic == "frintn",
        }
    }

    /// Compares vectors of f32, as only the edges of a page do.
    pub(crate) fn is_comparison(&self) -> bool {
        match self.architecture {
            Architecture::X86 => self.mnemonic.starts_with("vcmp") && self.mnemonic.ends_with("ps"),
            Architecture::Aarch64 => self.mnemonic.starts_with("fcm") && self.operands.contains(".4s"),
        }
    }

    /// Takes part in widening elements of storage: halves, or the integers of words that hold several.
    pub(crate) fn is_widening(&self) -> bool {
        match self.architecture {
            Architecture::X86 => ["vcvtph2ps", "vpslld", "vcvtdq2ps", "vpsraw"].contains(&self.mnemonic),
            Architecture::Aarch64 => ["shl", "fcvtl", "scvtf"].contains(&self.mnemonic),
        }
    }

    /// Moves or uses a vector whose address counts from one of `bases`.
    pub(crate) fn is_vector_access(&self, bases: &[&str]) -> bool {
        let from_base = match self.architecture {
            Architecture::X86 => bases.iter().any(|base| self.operands.contains(&format!("({base}"))),
            Architecture::Aarch64 => bases
                .iter()
                .any(|base| [']', ','].iter().any(|end| self.operands.contains(&format!("[{base}{end}")))),
        };
        from_base && self.is_of_vectors()
    }

    /// Writes a vector to memory.
    pub(crate) fn is_vector_store(&self) -> bool {
        self.is_of_vectors()
            && match self.architecture {
                Architecture::X86 => {
                    self.operands.split("{%k").next().is_some_and(|operands| operands.ends_with(')'))
                }
                Architecture::Aarch64 => self.mnemonic.starts_with("st"),
            }
    }

    fn is_of_vectors(&self) -> bool {
        match self.architecture {
            Architecture::X86 => self.mnemonic.starts_with('v'),
            Architecture::Aarch64 => {
                let first = self.operands.trim_start_matches(['{', ' ']);
                first.starts_with(['q', 'v', 'd', 's']) && !first.starts_with("sp")
            }
        }
    }

    /// Makes the frame pointer a second stack pointer, in a function that has one; elsewhere it is a register like others.
    pub(crate) fn is_frame_set_up(&self) -> bool {
        match self.architecture {
            Architecture::X86 => self.mnemonic == "mov" && self.operands == "%rsp,%rbp",
            Architecture::Aarch64 => {
                ["mov", "add"].contains(&self.mnemonic) && self.operands.starts_with("x29, sp")
            }
        }
    }
}
