//! What workers say in the second pass of a call.

use attnd_plan::{CallEvent, ReportId};
use attnd_wire::{AttendReply, Elements, Error, ShareReport, refusal};
use bytes::Bytes;

use super::super::second_pass;
use super::{Flow, gone};

impl Flow<'_> {
    /// Elements are handed on as they are.
    pub(super) fn take_elements(&mut self, share: usize, elements: Elements) -> Result<(), Error> {
        let id = self.rows_of(elements.head / self.begin.shape.group_size(), elements.tokens.start);
        if elements.tokens.end > id.first_token + id.tokens {
            let worker = self.shares.get(share).map(|share| share.worker.clone());
            let detail = format!("elements of tokens {:?}, over the end of a cell", elements.tokens);
            return Err(worker.map_or_else(gone, |worker| refusal::worker_lost(&worker, &detail)));
        }
        let n = (elements.tokens.len() * elements.keys.len()) as u64;
        self.event(CallEvent::Elements { share, id, elements: n }, &Bytes::new())?;
        self.outbox.push_back(AttendReply::Elements(elements).into());
        Ok(())
    }

    /// The rows of a cell with that token.
    fn rows_of(&self, group: usize, token: usize) -> ReportId {
        let first_token = token / self.tokens_per_cell * self.tokens_per_cell;
        let tokens = self.tokens_per_cell.min(self.begin.shape.n_queries().saturating_sub(first_token));
        ReportId { group, first_token, tokens }
    }

    pub(super) fn take_report(&mut self, share: usize, report: ShareReport) -> Result<(), Error> {
        let id =
            ReportId { group: report.group, first_token: report.tokens.start, tokens: report.tokens.len() };
        let key = (id.group, id.first_token);
        self.backlog.took_report(share, key, second_pass::bytes_of(&report.report));
        if self.second.as_mut().is_some_and(|second| !second.reported(report)) {
            let worker = self.shares.get(share).map(|share| share.worker.clone());
            let detail = format!("reported on group {} tokens from {} before they had merged", key.0, key.1);
            return Err(worker.map_or_else(gone, |worker| refusal::worker_lost(&worker, &detail)));
        }
        // If it is refused, the call ends.
        self.event(CallEvent::Report { share, id }, &Bytes::new())
    }
}
