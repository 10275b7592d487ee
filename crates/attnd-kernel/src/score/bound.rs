//! Parameters matched with the shapes that a function says they have.

use std::cell::Cell;

use super::Function;
use super::parameters::{Parameter, ScoreError, Symbol, Tensor};
use crate::project::Linear;
use crate::shape::AttnShape;

/// Most of what parameters alone say. A row of a page takes 1 KiB for each filter while it is computed.
const LIMITS: [(Symbol, usize); 3] = [(Symbol::Units, 1024), (Symbol::Filters, 1024), (Symbol::Taps, 4096)];
/// Most that projections may take, which may be much more than the parameters that they are made of: each is padded to 64 outputs.
const MAX_PROJECTION_BYTES: u64 = 16 << 20;

/// The parameters of a function for calls of one shape, of which all that must be there are, with the shapes they should have.
#[derive(Debug)]
pub(crate) struct Bound<'a> {
    function: &'static Function,
    pub(crate) shape: &'a AttnShape,
    /// What each of the function's parameters is, in their order.
    matched: Vec<Option<Matched<'a>>>,
    /// Sizes that parameters alone say.
    free: Vec<(Symbol, usize)>,
    /// Bytes of the projections that were made.
    projections: Cell<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Matched<'a> {
    tensor: &'a Tensor,
    /// Which of the shapes it has.
    shape: usize,
}

impl<'a> Bound<'a> {
    /// # Errors
    /// [`ScoreError`] for the first parameter that is missing, surplus, of another shape or not finite.
    pub(super) fn new(
        function: &'static Function,
        tensors: &'a [Tensor],
        shape: &'a AttnShape,
    ) -> Result<Self, ScoreError> {
        let name = function.name;
        for (i, tensor) in tensors.iter().enumerate() {
            let is_known = function.parameters.iter().any(|parameter| parameter.name == tensor.name);
            if !is_known || tensors[..i].iter().any(|other| other.name == tensor.name) {
                let known: Vec<&str> = function.parameters.iter().map(|parameter| parameter.name).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(ScoreError::Surplus { function: name, parameter: tensor.name.clone(), known });
            }
        }
        let mut bound =
            Self { function, shape, matched: Vec::new(), free: Vec::new(), projections: Cell::new(0) };
        for parameter in function.parameters {
            let tensor = tensors.iter().find(|tensor| tensor.name == parameter.name);
            if tensor.is_none() && parameter.default.is_none() {
                let (parameter, shape) = (parameter.name, bound.expected(parameter));
                return Err(ScoreError::Missing { function: name, parameter, shape });
            }
            let matched = tensor.map(|tensor| bound.matched(parameter, tensor)).transpose()?;
            bound.matched.push(matched);
        }
        for (what, limit) in LIMITS {
            match bound.free(what) {
                Some(got) if got > limit => {
                    return Err(ScoreError::Limit { function: name, what, got, limit });
                }
                _ => {}
            }
        }
        Ok(bound)
    }

    /// A projection of the function.
    ///
    /// # Errors
    /// [`ScoreError::Projections`] if all of them together are too large, before this one is made; [`ScoreError::OutOfMemory`].
    pub(crate) fn linear(&self, weight: &[f32], size: [usize; 2]) -> Result<Linear, ScoreError> {
        let bytes = self.projections.get() + 4 * Linear::words(size) as u64;
        if bytes > MAX_PROJECTION_BYTES {
            let (function, limit) = (self.function.name, MAX_PROJECTION_BYTES);
            return Err(ScoreError::Projections { function, bytes, limit });
        }
        self.projections.set(bytes);
        Ok(Linear::new(weight, size, None)?)
    }

    /// Bytes of all projections.
    pub(super) fn projection_bytes(&self) -> u64 {
        self.projections.get()
    }

    fn matched(&mut self, parameter: &Parameter, tensor: &'a Tensor) -> Result<Matched<'a>, ScoreError> {
        let expected = tensor.shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        if expected != Some(tensor.values.len()) {
            let (parameter, got) = (parameter.name, tensor.values.len());
            return Err(ScoreError::Length { parameter, got, expected: expected.unwrap_or(usize::MAX) });
        }
        for (i, symbols) in parameter.shapes.iter().enumerate() {
            if let Some(free) = self.sizes(symbols, &tensor.shape) {
                self.free = free;
                if let Some(at) = tensor.values.iter().position(|value| !value.is_finite()) {
                    let (parameter, value) = (parameter.name, tensor.values[at]);
                    return Err(ScoreError::Value { parameter, at, value, expected: "a finite number" });
                }
                return Ok(Matched { tensor, shape: i });
            }
        }
        Err(ScoreError::Shape {
            function: self.function.name,
            parameter: parameter.name,
            got: tensor.shape.clone(),
            expected: self.expected(parameter),
        })
    }

    /// The free sizes that make `symbols` these sizes, beside those that are known; `None` if nothing does.
    fn sizes(&self, symbols: &[Symbol], sizes: &[usize]) -> Option<Vec<(Symbol, usize)>> {
        if symbols.len() != sizes.len() {
            return None;
        }
        let mut free = self.free.clone();
        for (symbol, size) in symbols.iter().zip(sizes) {
            let known = self.size(*symbol).or_else(|| value_of(&free, *symbol));
            match known {
                Some(known) if known != *size => return None,
                Some(_) => {}
                None if *size == 0 => return None,
                None => free.push((*symbol, *size)),
            }
        }
        Some(free)
    }

    /// What a symbol is, if the call's shape says it.
    fn size(&self, symbol: Symbol) -> Option<usize> {
        let shape = self.shape;
        match symbol {
            Symbol::Batch => Some(shape.batch()),
            Symbol::Heads => Some(shape.n_heads()),
            Symbol::KvHeads => Some(shape.n_kv_heads()),
            Symbol::Queries => Some(shape.n_queries()),
            Symbol::QueryDim => Some(shape.query_dim()),
            Symbol::KeyDim => Some(shape.head_dim()),
            Symbol::BothDims => Some(shape.query_dim() + shape.head_dim()),
            Symbol::One => Some(1),
            Symbol::Units | Symbol::Positions | Symbol::Filters | Symbol::Taps => None,
        }
    }

    /// What a free symbol is, if a parameter has said it.
    pub(crate) fn free(&self, symbol: Symbol) -> Option<usize> {
        value_of(&self.free, symbol)
    }

    /// The shapes of a parameter for people.
    fn expected(&self, parameter: &Parameter) -> String {
        let of_symbol = |symbol: &Symbol| match self.size(*symbol).or_else(|| self.free(*symbol)) {
            Some(size) if *symbol != Symbol::One => format!("{symbol} {size}"),
            _ => symbol.to_string(),
        };
        let of_shape = |symbols: &&[Symbol]| {
            format!("[{}]", symbols.iter().map(of_symbol).collect::<Vec<_>>().join(", "))
        };
        parameter.shapes.iter().map(of_shape).collect::<Vec<_>>().join(" or ")
    }

    fn place(&self, name: &str) -> usize {
        let place = self.function.parameters.iter().position(|parameter| parameter.name == name);
        place.unwrap_or_else(|| panic!("score={} has no parameter {name}", self.function.name))
    }

    /// A parameter's values, and which of its shapes they have; `None` where it wasn't given.
    pub(crate) fn given(&self, name: &str) -> Option<(&'a [f32], usize)> {
        self.matched[self.place(name)].map(|Matched { tensor, shape }| (&tensor.values[..], shape))
    }

    /// The values of a parameter for each head, or for all of them: what its first shape holds. One that wasn't given is its
    /// default, once.
    pub(crate) fn per_head(&self, name: &str) -> PerHead<Vec<f32>> {
        let place = self.place(name);
        match self.matched[place] {
            None => PerHead(vec![vec![self.function.parameters[place].default.unwrap_or_default()]]),
            Some(Matched { tensor, shape: 0 }) => PerHead(vec![tensor.values.to_vec()]),
            Some(Matched { tensor, .. }) => {
                let of_head = tensor.values.len() / tensor.shape.first().copied().unwrap_or(1).max(1);
                PerHead(tensor.values.chunks(of_head.max(1)).map(<[f32]>::to_vec).collect())
            }
        }
    }

    /// The one dimension of queries and keys.
    ///
    /// # Errors
    /// If they differ.
    pub(crate) fn same_dim(&self) -> Result<usize, ScoreError> {
        let (query_dim, key_dim) = (self.shape.query_dim(), self.shape.head_dim());
        if query_dim == key_dim {
            return Ok(key_dim);
        }
        Err(ScoreError::Dims { function: self.function.name, query_dim, key_dim })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.function.name
    }
}

fn value_of(free: &[(Symbol, usize)], symbol: Symbol) -> Option<usize> {
    free.iter().find(|(known, _)| *known == symbol).map(|(_, size)| *size)
}

/// One thing for all heads, or one for each.
#[derive(Clone, Debug)]
pub(crate) struct PerHead<T>(Vec<T>);

impl<T> PerHead<T> {
    /// That of a head.
    pub(crate) fn of(&self, head: usize) -> &T {
        &self.0[if self.0.len() == 1 { 0 } else { head }]
    }

    /// One for all.
    pub(crate) fn one(thing: T) -> Self {
        Self(vec![thing])
    }

    /// Of this, which kv heads tell apart, and of another thing, which query heads do.
    ///
    /// # Errors
    /// The first of `f`.
    pub(crate) fn with_queries<U, R>(
        &self,
        group_size: usize,
        other: &PerHead<U>,
        mut f: impl FnMut(&T, &U) -> Result<R, ScoreError>,
    ) -> Result<PerHead<R>, ScoreError> {
        let of_kv_heads = if self.0.len() == 1 { 1 } else { self.0.len() * group_size };
        let n = of_kv_heads.max(other.0.len());
        let of_head = |head: usize| f(self.of(head / group_size), other.of(head));
        Ok(PerHead((0..n).map(of_head).collect::<Result<_, _>>()?))
    }

    /// That of kv heads as that of their query heads.
    pub(crate) fn for_group(&self, group_size: usize) -> Self
    where
        T: Clone,
    {
        if self.0.len() == 1 {
            return self.clone();
        }
        Self(self.0.iter().flat_map(|thing| vec![thing.clone(); group_size]).collect())
    }

    /// # Errors
    /// The first of `f`.
    pub(crate) fn try_map<U>(
        &self,
        f: impl FnMut(&T) -> Result<U, ScoreError>,
    ) -> Result<PerHead<U>, ScoreError> {
        Ok(PerHead(self.0.iter().map(f).collect::<Result<_, _>>()?))
    }

    /// Of this and of another thing, for each head that either tells apart.
    ///
    /// # Errors
    /// The first of `f`.
    pub(crate) fn with<U, R>(
        &self,
        other: &PerHead<U>,
        mut f: impl FnMut(&T, &U) -> Result<R, ScoreError>,
    ) -> Result<PerHead<R>, ScoreError> {
        let n = self.0.len().max(other.0.len());
        Ok(PerHead((0..n).map(|head| f(self.of(head), other.of(head))).collect::<Result<_, _>>()?))
    }
}
