//! `attnd explain`: which keys queries attend to, in tables and in a picture.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::num::NonZeroUsize;
use std::ops::Range;

use attnd_client::{AttendOptions, Attended, Inspected, Operands, OutputsParts, Rectangle, Stage};
use attnd_kernel::Dtype;

use super::attend::call;
use crate::args::{ExplainArgs, HeadChoice, PicturePath};
use crate::exit::BadInput;
use crate::explain::one_element::{asked_around, csr_of, score_of, swin_of};
use crate::explain::part::Rules;
use crate::explain::tables::{head_table, key_table};
use crate::explain::views::{Answer, Explanation, HeatmapView};
use crate::explain::words::{self, Words};
use crate::heatmap::{HeadPanel, Maps, WeightUnit};
use crate::options;
use crate::output;
use crate::score_numbers;
use crate::site::Site;
use crate::tensor_file::{self, Inputs, Tensor, Values};

/// Keys are listed for at most so many queries: more than that nobody reads.
const MAX_LISTED: usize = 64;
/// Weights that are fetched at most to take their mean over heads: 1 GiB of f32.
const MAX_MEAN: usize = 1 << 28;

/// Runs the verb.
///
/// # Errors
/// [`BadInput`] and the errors of reading files end the process with code 2, others with 1, among them a picture that
/// can't be written.
pub async fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let site = Site::of(&args.site, |key| std::env::var(key).ok())?;
    if let Some(picture) = &args.heatmap {
        check_picture(args, picture)?;
    }
    let read = |flag, path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| words::read(flag, path)).transpose()
    };
    let (key_words, query_words) =
        (read("--tokens", &args.tokens)?, read("--query-tokens", &args.query_tokens)?);
    let options = options::of_flags(&args.operator, &args.site)?;
    let inputs = inputs(args)?;
    inputs.notes.iter().for_each(|note| output::note(note));
    let shape = inputs.operands.shape;
    options::check_documents(&args.operator, &shape)?;
    let score = score_numbers::spread(options.score, &args.operator.function, &shape)?;
    let options = AttendOptions { score, ..options };
    inside("--batch", &(args.batch..args.batch.saturating_add(1)), "elements of the batch", shape.batch())?;
    let rules = Rules::new(options.causal, options.mask.clone(), shape, args.batch)?;
    // What is cut out of a call may make sense where the call doesn't: a list of three numbers for three of its queries.
    inputs.operands.check(&options)?;
    let words = Words::new(key_words, query_words, &rules)?;
    let question = Question::new(args, &rules, &options)?;

    let answers = site.ask(async |endpoint| question.ask(endpoint, &options, &inputs.operands).await).await?;
    let view = question.explanation(&answers, &words);
    let picture = args.heatmap.as_ref().zip(answers.heat());
    let heatmap = picture.map(|(path, heat)| question.draw(path, heat, &words)).transpose();
    // The calls were made and may have taken hours: what is known is printed even where the disk is full.
    let (heatmap, failed) = match heatmap {
        Ok(heatmap) => (heatmap, None),
        Err(error) => (None, Some(error)),
    };
    let reported = report(args, &Explanation { heatmap, ..view }, &answers.numbers, question.unit());
    match failed {
        Some(error) => Err(error.into()),
        None => reported,
    }
}

fn check_picture(args: &ExplainArgs, picture: &PicturePath) -> Result<(), BadInput> {
    tensor_file::check(picture.path()).map_err(|error| BadInput::new(error.to_string()))?;
    for (option, source) in [("--q", &args.q), ("--k", &args.k)].into_iter().chain(args.operator.sources()) {
        if tensor_file::is_file_of(picture.path(), source) {
            let path = picture.path().display();
            let text = format!("--heatmap {path} is the file of {option} {source}, which it would replace");
            return Err(BadInput::new(text));
        }
    }
    Ok(())
}

/// Queries and keys, and values of the least width there is: no weight depends on them, and a call has some.
fn inputs(args: &ExplainArgs) -> anyhow::Result<Inputs> {
    let (q, k) = (tensor_file::read(&args.q)?, tensor_file::read(&args.k)?);
    let [batch, heads, tokens, _] = k.shape;
    let elements = [batch, heads, tokens].iter().try_fold(1, |n: usize, dim| n.checked_mul(*dim));
    let zeros = elements.and_then(|n| n.checked_mul(k.dtype.size())).unwrap_or(0);
    let v = Tensor {
        shape: [batch, heads, tokens, 1],
        rounded_from_f64: false,
        bytes: vec![0; zeros].into(),
        ..k.clone()
    };
    let query_dim = options::query_dim(&args.operator);
    if q.dtype == k.dtype {
        return Ok(tensor_file::assemble(q, k, Values::Sent(v), query_dim)?);
    }
    let note = format!("q and k are {} and {}; both travel as {}", q.dtype, k.dtype, Dtype::F32);
    let [q, k, v] = [q, k, v].map(Tensor::into_f32);
    let mut inputs = tensor_file::assemble(q, k, Values::Sent(v), query_dim)?;
    inputs.notes.push(note);
    Ok(inputs)
}

/// Refuses a range that is not among `n` things.
fn inside(flag: &str, range: &Range<usize>, what: &str, n: usize) -> Result<(), BadInput> {
    if range.start < range.end && range.end <= n {
        return Ok(());
    }
    Err(BadInput::new(format!("{flag} {}..{}: there are {n} {what}, from 0", range.start, range.end)))
}

/// What is asked for, once the shape is known.
#[derive(Debug)]
struct Question<'a> {
    args: &'a ExplainArgs,
    rules: &'a Rules,
    /// What the tables are about.
    queries: Range<usize>,
    /// The queries of the call that has them.
    asked: Range<usize>,
    /// Heads that are shown; all for their mean.
    heads: Range<usize>,
}

/// What came back.
#[derive(Debug)]
struct Answers {
    /// Of the chosen queries.
    numbers: Attended,
    /// Of the call that had all queries, if the other one hadn't and a picture is wanted.
    whole: Option<Attended>,
    seconds: f64,
}

impl Answers {
    fn heat(&self) -> Option<&Inspected> {
        let inspected = &self.whole.as_ref().unwrap_or(&self.numbers).inspected;
        (!inspected.heat.is_empty()).then_some(inspected)
    }
}

impl<'a> Question<'a> {
    fn new(args: &'a ExplainArgs, rules: &'a Rules, options: &AttendOptions) -> Result<Self, BadInput> {
        let shape = rules.shape();
        let queries = args.query.on(shape.n_queries());
        inside("--query", &queries, "queries", shape.n_queries())?;
        let heads = match args.head {
            HeadChoice::One(head) => head..head.saturating_add(1),
            HeadChoice::Mean | HeadChoice::All => 0..shape.n_heads(),
        };
        inside("--head", &heads, "heads", shape.n_heads())?;
        let asked = asked_around(options, args.batch, shape, &queries);
        let question = Self { args, rules, queries, asked, heads };
        if question.needs_weights() {
            let rows = shape.n_heads().saturating_mul(question.queries.len());
            let n = rows.saturating_mul(shape.n_keys());
            if n > MAX_MEAN {
                let text = format!(
                    "the mean over heads takes {n} weights of --query {}, more than {MAX_MEAN}; \
                     ask for --head all or for fewer queries",
                    args.query
                );
                return Err(BadInput::new(text));
            }
        }
        Ok(question)
    }

    /// Whether a row of weights sums to anything.
    fn has_sigmoids(&self) -> bool {
        self.args.operator.scores.sigmoid.is_some()
    }

    fn unit(&self) -> WeightUnit {
        if self.has_sigmoids() { WeightUnit::Plain } else { WeightUnit::Percent }
    }

    /// Whether keys are listed for each query.
    fn is_listed(&self) -> bool {
        self.queries.len() <= MAX_LISTED
    }

    /// Whether all weights of the chosen queries are needed, and not only the largest.
    fn needs_weights(&self) -> bool {
        self.is_listed() && self.args.head == HeadChoice::Mean
    }

    /// Whether the call of the numbers has all queries, and so the map.
    fn is_whole(&self) -> bool {
        self.asked.len() == self.rules.shape().n_queries()
    }

    /// The chosen queries, by their places in that call.
    fn places(&self) -> Range<usize> {
        let begin = self.queries.start - self.asked.start;
        begin..begin + self.queries.len()
    }

    /// Rows and columns of a map.
    fn grid(&self) -> (usize, usize) {
        let side = self.args.heatmap_size.get();
        (side.min(self.rules.shape().n_queries()), side.min(self.rules.shape().n_keys()))
    }

    /// What tables are made of: of each row a few numbers and the weight of the first key.
    fn numbers(&self) -> OutputsParts {
        let (heads, tokens) = (0..self.rules.shape().n_heads(), self.places());
        let first_key = self.rules.first_key();
        let rectangle =
            |keys| Rectangle { stage: Stage::Weights, heads: heads.clone(), tokens: tokens.clone(), keys };
        let mut rectangles = vec![rectangle(first_key..first_key + 1)];
        if self.needs_weights() {
            rectangles.push(rectangle(0..self.rules.shape().n_keys()));
        }
        let lists_heads = self.is_listed() && !self.needs_weights();
        OutputsParts {
            rectangles,
            top_k: if lists_heads { self.args.top_k.get() } else { 0 },
            // Sigmoids are no distribution, so a row has no entropy; what it has instead is a sum.
            entropy: !self.has_sigmoids(),
            mass_block: NonZeroUsize::new(self.rules.shape().n_keys()).filter(|_| self.has_sigmoids()),
            distance: self.rules.has_distances(),
            max_score: true,
            heatmap: (self.args.heatmap.is_some() && self.is_whole()).then(|| self.grid()),
            ..OutputsParts::default()
        }
    }

    /// The map of all queries, of the heads that are drawn.
    fn map(&self) -> OutputsParts {
        OutputsParts {
            heatmap: Some(self.grid()),
            heads: Some(self.heads.clone()),
            ..OutputsParts::default()
        }
    }

    async fn ask(
        &self,
        endpoint: &str,
        options: &AttendOptions,
        whole: &Operands,
    ) -> anyhow::Result<Answers> {
        let (batch, shape) = (self.rules.batch(), self.rules.shape());
        let part = async |queries: &Range<usize>, outputs| {
            // What the causal rule says is in the mask.
            let options = AttendOptions {
                causal: attnd_client::Causal::None,
                score: score_of(&options.score, batch, shape, queries),
                previous: options.previous.as_ref().map(|weights| self.rules.dense_of(weights, queries)),
                swin: options.swin.as_ref().map(|swin| swin_of(swin, batch)),
                csr: options.csr.as_ref().map(|csr| csr_of(csr, batch, shape, queries)),
                mask: self.rules.mask_of(queries),
                dense_mask: options.dense_mask.as_ref().map(|mask| self.rules.dense_of(mask, queries)),
                dense_bias: options.dense_bias.as_ref().map(|bias| self.rules.dense_of(bias, queries)),
                alibi: options.alibi.clone().map(|alibi| self.rules.alibi_of(alibi)),
                outputs,
                ..options.clone()
            };
            call(endpoint, &options, &self.rules.operands_of(whole, queries)?).await
        };
        let (mut numbers, mut seconds) = part(&self.asked, self.numbers()).await?;
        keep_rows(&mut numbers.inspected, self.asked.len(), &self.places());
        let mut map = None;
        if self.args.heatmap.is_some() && !self.is_whole() {
            let (attended, more) = part(&(0..self.rules.shape().n_queries()), self.map()).await?;
            map = Some(attended);
            seconds += more;
        }
        Ok(Answers { numbers, whole: map, seconds })
    }

    fn explanation(&self, answers: &Answers, words: &Words) -> Explanation {
        let inspected = &answers.numbers.inspected;
        let answer = Answer { inspected, queries: self.queries.clone(), rules: self.rules, words };
        let elements = |i: usize| inspected.elements.get(i).map(Vec::as_slice).unwrap_or_default();
        let k = self.args.top_k.get();
        let attention = match self.args.head {
            _ if !self.is_listed() => Vec::new(),
            HeadChoice::Mean => vec![answer.attention_of_mean(elements(1), k)],
            HeadChoice::One(_) | HeadChoice::All => {
                self.heads.clone().map(|head| answer.attention_of_head(head, k)).collect()
            }
        };
        Explanation {
            batch: self.args.batch,
            n_queries: self.rules.shape().n_queries(),
            n_keys: self.rules.shape().n_keys(),
            normaliser: if self.has_sigmoids() { "sigmoid" } else { "softmax" },
            queries: [self.queries.start, self.queries.end],
            empty_rows: answer.empty_rows(),
            heads: answer.heads(self.heads.clone(), elements(0)),
            attention,
            heatmap: None,
            kernel_id: answers.numbers.kernel_id.clone(),
            seconds: answers.seconds,
        }
    }

    /// Writes the picture.
    fn draw(
        &self,
        to: &PicturePath,
        heat: &Inspected,
        words: &Words,
    ) -> Result<HeatmapView, tensor_file::WriteError> {
        let (rows, columns) = self.grid();
        let (queries, keys) = (self.rules.shape().n_queries(), self.rules.shape().n_keys());
        let map = |head: usize| {
            let cells =
                head.checked_sub(heat.heads.start).and_then(|i| heat.heat.chunks(rows * columns).nth(i));
            cells.unwrap_or_default().iter().map(|cell| f64::from(*cell))
        };
        let panel = |title: String, weights: Vec<f64>| {
            let most = weights.iter().copied().fold(0.0, f64::max);
            HeadPanel { title, caption: format!("at most {}", self.unit().short(most)), weights }
        };
        let panels: Vec<HeadPanel> = if self.args.head == HeadChoice::Mean {
            let mut sums = vec![0.0; rows * columns];
            for head in self.heads.clone() {
                sums.iter_mut().zip(map(head)).for_each(|(sum, cell)| *sum += cell);
            }
            sums.iter_mut().for_each(|sum| *sum /= self.heads.len() as f64);
            vec![panel(format!("Mean over {} heads", self.heads.len()), sums)]
        } else {
            self.heads.clone().map(|head| panel(format!("Head {head}"), map(head).collect())).collect()
        };
        let largest = panels.iter().flat_map(|panel| &panel.weights).copied().fold(0.0, f64::max);
        let pooled = if (rows, columns) == (queries, keys) {
            String::new()
        } else {
            format!(
                " Pooled to {rows} rows and {columns} columns: a cell is its queries' mean weight on its keys."
            )
        };
        let subtitle = format!(
            "{queries} queries (rows, from the top) on {keys} keys (columns); exact weights.{pooled}"
        );
        let maps = Maps {
            title: "Who attends to what",
            subtitle: &subtitle,
            queries,
            keys,
            rows,
            columns,
            query_words: &words.queries,
            key_words: &words.keys,
            unit: self.unit(),
            panels: &panels,
        };
        tensor_file::replace(to.path(), |temporary| {
            let mut file = BufWriter::new(File::create(temporary)?);
            match to {
                PicturePath::Png(_) => maps.write_png(&mut file)?,
                PicturePath::Svg(_) => file.write_all(maps.to_svg().as_bytes())?,
            }
            file.flush()?;
            Ok(file.get_ref().sync_all()?)
        })?;
        let heads =
            if self.args.head == HeadChoice::Mean { Vec::new() } else { self.heads.clone().collect() };
        Ok(HeatmapView { path: to.path().display().to_string(), rows, columns, heads, largest })
    }
}

/// Leaves some of the queries in outputs of rows, which come for all that a call has.
fn keep_rows(inspected: &mut Inspected, n_queries: usize, places: &Range<usize>) {
    fn keep<T: Copy>(values: &mut Vec<T>, n_heads: usize, n_queries: usize, places: &Range<usize>) {
        let row = values.len() / n_heads.saturating_mul(n_queries).max(1);
        if row > 0 {
            let heads = values.chunks(n_queries * row);
            let kept = heads.filter_map(|head| head.get(places.start * row..places.end * row));
            *values = kept.collect::<Vec<_>>().concat();
        }
    }
    if places.len() == n_queries {
        return;
    }
    let n_heads = inspected.heads.len();
    keep(&mut inspected.top_keys, n_heads, n_queries, places);
    for values in [
        &mut inspected.top_weights,
        &mut inspected.top_scores,
        &mut inspected.entropy,
        &mut inspected.distance,
        &mut inspected.max_score,
        &mut inspected.mass,
    ] {
        keep(values, n_heads, n_queries, places);
    }
}

fn report(
    args: &ExplainArgs,
    view: &Explanation,
    attended: &Attended,
    unit: WeightUnit,
) -> anyhow::Result<()> {
    if args.json {
        return output::json(view);
    }
    output::line(&format!("plan: {}", attended.plan.reason))?;
    let [first, end] = view.queries;
    let n = end - first;
    let one = view.attention.first().and_then(|attention| attention.queries.first());
    let word = one.and_then(|query| query.token.as_deref()).map(words::printable);
    let some = match (n, word) {
        (1, Some(word)) => format!("query {first} ({word})"),
        (1, None) => format!("query {first}"),
        (n, _) if n == view.n_queries => format!("all {n} queries"),
        (_, _) => format!("queries {first} to {}", end - 1),
    };
    let attend = if n == 1 { "attends" } else { "attend" };
    for attention in &view.attention {
        let heads = match attention.head {
            Some(head) => format!("head {head}"),
            None => format!("mean over {} heads", view.heads.len()),
        };
        output::line(&format!("\nWhat {some} {attend} to among {} keys, {heads}:", view.n_keys))?;
        output::line(&key_table(attention, unit).to_string())?;
    }
    if view.attention.is_empty() {
        let text = format!("\nKeys are listed for up to {MAX_LISTED} queries; --query {} is {n}", args.query);
        output::line(&text)?;
    }
    output::line(&format!("\nHeads, over {some}:"))?;
    output::line(&head_table(&view.heads, unit).to_string())?;
    if unit == WeightUnit::Plain {
        output::line(
            "Weights are sigmoids: a row of them sums to its weight sum, not to 1, and has no entropy",
        )?;
    }
    if view.empty_rows > 0 {
        let rows = n * attended.inspected.heads.len();
        output::line(&format!("{} of {rows} rows see no key and are in no mean", view.empty_rows))?;
    }
    match &view.heatmap {
        None => Ok(()),
        Some(HeatmapView { path, rows, columns, largest, .. }) => output::line(&format!(
            "wrote {path}: {rows} x {columns} cells, the darkest is {}",
            unit.short(*largest)
        )),
    }
}
