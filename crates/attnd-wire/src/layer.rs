//! The tower layer at the edge of a server: deadlines on the way in, statuses on the way out.
//!
//! On the way in, a request whose `grpc-timeout` is malformed or zero is answered before a handler runs; all others
//! carry their [`Deadline`] in the request's extensions, but for streams that stay open, which have none. On the way out, a response that is an error and nothing else
//! (the library's answer to an unknown method, an unreadable unary request, ...) is normalised. Errors in the middle
//! of a stream come from handlers, which make them from [`Error`].

use std::task::{Context, Poll};

use futures::TryFutureExt as _;
use futures::future::{Either, MapOk, Ready, ready};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::deadline::Deadline;
use crate::error::{Error, REASON_KEY};
use crate::surroundings::now;

/// Wraps a server's services in [`Edge`].
#[derive(Clone, Copy, Debug, Default)]
pub struct EdgeLayer;

impl<S> Layer<S> for EdgeLayer {
    type Service = Edge<S>;
    fn layer(&self, inner: S) -> Edge<S> {
        Edge { inner }
    }
}

/// A service whose requests carry a [`Deadline`] and whose error responses carry a reason.
#[derive(Clone, Debug)]
pub struct Edge<S> {
    inner: S,
}

type Normalise<B> = fn(Response<B>) -> Response<B>;

impl<S, In, Out> Service<Request<In>> for Edge<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    Out: Default,
{
    type Response = Response<Out>;
    type Error = S::Error;
    type Future = Either<Ready<Result<Response<Out>, S::Error>>, MapOk<S::Future, Normalise<Out>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<In>) -> Self::Future {
        match Deadline::of_request(request.uri().path(), request.headers(), now()) {
            Ok(deadline) => {
                if let Some(deadline) = deadline {
                    request.extensions_mut().insert(deadline);
                }
                Either::Right(self.inner.call(request).map_ok(normalise_response as Normalise<Out>))
            }
            Err(error) => Either::Left(ready(Ok(refusal(&error)))),
        }
    }
}

fn refusal<B: Default>(error: &Error) -> Response<B> {
    let mut response = Response::new(B::default());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    write_status(response.headers_mut(), error);
    response
}

/// Rewrites the status of a response that consists of headers only and has no reason yet.
fn normalise_response<B>(mut response: Response<B>) -> Response<B> {
    if !response.headers().contains_key(REASON_KEY)
        && let Some(status) = status_of(response.headers())
    {
        write_status(response.headers_mut(), &Error::from_status(&status));
    }
    response
}

/// The status in `headers`, if it is one and not OK.
fn status_of(headers: &HeaderMap) -> Option<Status> {
    // Only what is needed: the library panics on details that aren't base64.
    let wanted = [Status::GRPC_STATUS, Status::GRPC_MESSAGE];
    let few: HeaderMap =
        wanted.into_iter().filter_map(|key| Some((key.clone(), headers.get(key)?.clone()))).collect();
    Status::from_header_map(&few).filter(|status| status.code() != Code::Ok)
}

fn write_status(headers: &mut HeaderMap, error: &Error) {
    headers.remove(Status::GRPC_STATUS_DETAILS);
    headers.remove(Status::GRPC_MESSAGE);
    // Fails only for text that is no header value, and the library escapes it; the code is written either way.
    if Status::from(error).add_header(headers).is_err() {
        headers.insert(Status::GRPC_STATUS, HeaderValue::from_static("13"));
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::FutureExt as _;
    use tower::service_fn;

    use super::*;

    /// Runs one request through the layer in front of `answer`.
    fn ask(timeout: Option<&'static str>, answer: fn(Request<()>) -> Response<()>) -> Response<()> {
        let handler = service_fn(move |request| ready(Ok::<_, Infallible>(answer(request))));
        let mut request = Request::new(());
        if let Some(timeout) = timeout {
            request.headers_mut().insert("grpc-timeout", HeaderValue::from_static(timeout));
        }
        EdgeLayer.layer(handler).call(request).now_or_never().unwrap().unwrap()
    }

    fn error_of(response: &Response<()>) -> Error {
        Error::from_status(&Status::from_header_map(response.headers()).unwrap())
    }

    #[test]
    fn bad_timeouts_are_refused_before_the_handler() {
        let untouched = |_| panic!("the handler ran");
        assert_eq!(error_of(&ask(Some("10X"), untouched)).message(), "DEADLINE_FORMAT: '10X'");
        let response = ask(Some("0m"), untouched);
        assert_eq!(error_of(&response).message(), "DEADLINE: expired on arrival");
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(response.headers()["content-type"], "application/grpc");
    }

    #[test]
    fn handlers_find_their_deadline() {
        let response = ask(Some("10S"), |request| {
            let deadline = request.extensions().get::<Deadline>().unwrap();
            let left = deadline.remaining(now()).unwrap().as_secs_f64();
            assert!(left > 5.0 && left <= 10.0, "{left}");
            Response::new(())
        });
        assert!(response.headers().is_empty());
    }

    #[test]
    fn streams_that_stay_open_reach_their_handlers_without_a_deadline() {
        for (path, has_one) in [(crate::deadline::OPEN_ENDED[0], false), ("/attnd.v1.Attention/Attend", true)]
        {
            let handler = service_fn(move |request: Request<()>| {
                assert_eq!(request.extensions().get::<Deadline>().is_some(), has_one, "{path}");
                ready(Ok::<_, Infallible>(Response::new(())))
            });
            let mut request = Request::new(());
            *request.uri_mut() = path.parse().unwrap();
            let _answer = EdgeLayer.layer(handler).call(request).now_or_never().unwrap().unwrap();
        }
    }

    #[test]
    fn error_responses_of_the_library_get_a_reason() {
        let response = ask(None, |_| Status::unimplemented("").into_http());
        assert_eq!(error_of(&response).message(), "METHOD: no such service or method");
        assert_eq!(response.headers()["attnd-reason"], "METHOD");
        assert_eq!(response.headers()["attnd-outcome"], "not_executed");
    }

    #[test]
    fn errors_of_handlers_and_successes_stay() {
        let response = ask(None, |_| Status::from(Error::new(crate::Reason::Scale, "x")).into_http());
        assert_eq!(error_of(&response).message(), "SCALE: x");
        let response = ask(None, |_| Status::new(Code::Ok, "").into_http());
        assert!(!response.headers().contains_key(REASON_KEY));
    }

    #[test]
    fn unreadable_details_do_not_panic() {
        let response = ask(None, |_| {
            let mut response = Status::internal("Missing request message.").into_http();
            response.headers_mut().insert("grpc-status-details-bin", HeaderValue::from_static("!!!"));
            response
        });
        assert_eq!(error_of(&response).message(), "PROTOCOL: Missing request message.");
    }
}
