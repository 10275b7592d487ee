//! How scores become weights.

/// What a row's weights are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Normaliser {
    /// `exp(s_j)` over their sum.
    #[default]
    Softmax,
    /// `1 / (1 + exp(-(s_j + bias)))`, each on its own. A partial has `m = 0` and the sum of the weights for `l`, so that merging
    /// is adding; the context isn't divided.
    Sigmoid {
        /// In natural units; finite.
        bias: f32,
    },
}
