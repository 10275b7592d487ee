//! Views as tables for a terminal.

use comfy_table::Table;

use super::views::{AttentionView, HeadView, KeyView, QueryView};
use super::words::printable;
use crate::heatmap::WeightUnit;
use crate::table;

/// Characters of the longest bar.
const BAR: usize = 16;

/// A row for each key that the queries of a view attend to. A query is named in its first row, and only where there are several.
pub fn key_table(view: &AttentionView, unit: WeightUnit) -> Table {
    let several = view.queries.len() > 1;
    let last = if view.head.is_some() { "score" } else { "most in head" };
    let header = ["query", "key", "token", "weight", "", last];
    let mut table = table::with_header(&header[usize::from(!several)..]);
    let weights = view.queries.iter().flat_map(|query| &query.keys).map(|key| key.weight);
    let largest = weights.fold(0.0, f64::max);
    for query in &view.queries {
        let nothing = KeyView { key: 0, token: None, weight: 0.0, score: None, strongest: None };
        let keys = if query.keys.is_empty() { std::slice::from_ref(&nothing) } else { &query.keys };
        for (i, key) in keys.iter().enumerate() {
            let named = if i == 0 { query_name(query) } else { String::new() };
            let none = if query.sees_key { "weighs no key" } else { "sees no key" };
            let cells = if query.keys.is_empty() {
                let [a, b, c, d] = [const { String::new() }; 4];
                [named, a, none.into(), b, c, d]
            } else {
                [
                    named,
                    key.key.to_string(),
                    printable(key.token.as_deref().unwrap_or_default()),
                    unit.short(key.weight),
                    bar(key.weight / largest),
                    detail(key, unit),
                ]
            };
            table.add_row(&cells[usize::from(!several)..]);
        }
    }
    let shift = usize::from(several);
    table::align_right(&mut table, &[shift, 2 + shift, 4 + shift]);
    table
}

/// A query's place and word.
fn query_name(query: &QueryView) -> String {
    match &query.token {
        Some(token) => format!("{} {}", query.query, printable(token)),
        None => query.query.to_string(),
    }
}

fn detail(key: &KeyView, unit: WeightUnit) -> String {
    match (key.score, key.strongest) {
        (Some(score), _) => format!("{score:.3}"),
        (None, Some(strongest)) => format!("{}: {}", strongest.head, unit.short(strongest.weight)),
        (None, None) => String::new(),
    }
}

/// A row for each head. Weights that are no shares of a row have no entropy, but a sum.
pub fn head_table(heads: &[HeadView], unit: WeightUnit) -> Table {
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |x| format!("{x:.digits$}"));
    let of_rows = |head: &HeadView| match unit {
        WeightUnit::Percent => vec![number(head.entropy, 3), number(head.effective_keys, 1)],
        WeightUnit::Plain => vec![number(head.weight_sum, 3)],
    };
    let of_rows_named: &[&str] = match unit {
        WeightUnit::Percent => &["entropy", "keys"],
        WeightUnit::Plain => &["weight sum"],
    };
    let header = [&["head"], of_rows_named, &["distance", "first key", "max score"]].concat();
    let mut table = table::with_header(&header);
    for head in heads {
        let row = [
            vec![head.head.to_string()],
            of_rows(head),
            vec![
                number(head.distance, 1),
                head.first_key.map_or("-".into(), |weight| unit.short(weight)),
                number(head.max_score, 3),
            ],
        ];
        table.add_row(row.concat());
    }
    table::align_right(&mut table, &Vec::from_iter(0..header.len()));
    table
}

/// A share of the longest bar, to the eighth of a character.
fn bar(share: f64) -> String {
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    // False for NaN, which `min` would make a whole bar.
    let share = if share > 0.0 { share.min(1.0) } else { 0.0 };
    let eighths = (share * (8 * BAR) as f64).round() as usize;
    format!("{}{}", "█".repeat(eighths / 8), PARTS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::super::views::Strongest;
    use super::*;

    fn query(query: usize, keys: &[(usize, f64)]) -> QueryView {
        let key = |(key, weight): &(usize, f64)| KeyView {
            key: *key,
            token: Some(format!("w{key}\n")),
            weight: *weight,
            score: Some(-1.5),
            strongest: None,
        };
        let (token, keys): (_, Vec<KeyView>) = (Some("the".into()), keys.iter().map(key).collect());
        QueryView { query, position: None, token, sees_key: !keys.is_empty(), keys }
    }

    /// The cells of each row, without the lines between them.
    fn rows(table: &Table) -> Vec<Vec<String>> {
        let text = table.to_string();
        let rows = text.lines().filter(|line| line.contains('│') && !line.contains('╌'));
        rows.map(|row| row.split(['│', '┆']).map(|cell| cell.trim().to_owned()).collect::<Vec<_>>())
            .map(|cells| cells[1..cells.len() - 1].to_vec())
            .collect()
    }

    #[test]
    fn a_query_is_named_once_and_only_among_others() {
        let one = AttentionView { head: Some(2), queries: vec![query(7, &[(3, 0.5), (1, 0.25)])] };
        let table = rows(&key_table(&one, WeightUnit::Percent));
        assert_eq!(table[0], ["key", "token", "weight", "", "score"]);
        assert_eq!(table[1], ["3", "w3\\n", "50.00 %", &"█".repeat(16), "-1.500"]);
        assert_eq!(table[2], ["1", "w1\\n", "25.00 %", &"█".repeat(8), "-1.500"]);
        let two = AttentionView { head: Some(2), queries: vec![one.queries[0].clone(), query(8, &[])] };
        let table = rows(&key_table(&two, WeightUnit::Percent));
        assert_eq!((table[1][0].as_str(), table[2][0].as_str()), ("7 the", ""));
        assert_eq!(table[3], ["8 the", "", "sees no key", "", "", ""]);
        let faint = QueryView { sees_key: true, ..query(8, &[]) };
        let faint = AttentionView { head: None, queries: vec![faint] };
        assert_eq!(rows(&key_table(&faint, WeightUnit::Plain))[1], ["", "weighs no key", "", "", ""]);
    }

    #[test]
    fn means_name_the_head_that_weighs_most() {
        let mut view = AttentionView { head: None, queries: vec![query(0, &[(3, 0.5)])] };
        let key = &mut view.queries[0].keys[0];
        (key.score, key.strongest) = (None, Some(Strongest { head: 4, weight: 0.875 }));
        let table = rows(&key_table(&view, WeightUnit::Percent));
        assert_eq!((table[0][4].as_str(), table[1][4].as_str()), ("most in head", "4: 87.50 %"));
        let table = rows(&key_table(&view, WeightUnit::Plain));
        assert_eq!((table[1][2].as_str(), table[1][4].as_str()), ("0.5000", "4: 0.8750"));
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let head = HeadView {
            head: 3,
            entropy: Some(1.0),
            effective_keys: Some(1.0_f64.exp()),
            weight_sum: None,
            distance: None,
            first_key: Some(1e-9),
            max_score: Some(-2.0),
        };
        let table = rows(&head_table(std::slice::from_ref(&head), WeightUnit::Percent));
        assert_eq!(table[1], ["3", "1.000", "2.7", "-", "<0.01 %", "-2.000"]);
        let sigmoids = HeadView { entropy: None, effective_keys: None, weight_sum: Some(17.25), ..head };
        let table = rows(&head_table(&[sigmoids], WeightUnit::Plain));
        assert_eq!(table[0], ["head", "weight sum", "distance", "first key", "max score"]);
        assert_eq!(table[1], ["3", "17.250", "-", "1.000e-9", "-2.000"]);
    }

    #[test]
    fn bars_have_eighths() {
        assert_eq!(bar(1.0).chars().count(), BAR);
        assert_eq!([bar(0.0), bar(f64::NAN), bar(-1.0)], ["", "", ""]);
        assert_eq!(
            [bar(1.0 / 128.0), bar(0.5 + 3.0 / 128.0)],
            ["▏".to_owned(), format!("{}▍", "█".repeat(8))]
        );
    }
}
