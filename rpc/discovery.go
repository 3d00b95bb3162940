package rpc

import (
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/postrider/postrider"
)

// stats are the figures of one method, as discovery shows them.
type stats struct {
	mu        sync.Mutex
	requests  int
	errors    int
	lastError string
	time      time.Duration
}

// record counts a call that ended.
func (s *stats) record(took time.Duration, err error) {
	s.mu.Lock()
	s.requests++
	s.time += took
	s.mu.Unlock()
	if err != nil {
		s.fail(err)
	}
}

// fail counts an error.
func (s *stats) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errors++
	s.lastError = err.Error()
}

// discoverySubjects is how many subjects a service listens to for discovery: three verbs to all, by name, by name and id.
const discoverySubjects = 3 * 3

// announce answers discovery requests of the NATS micro protocol (nats-architecture-and-design: ADR-32), so that
// "nats service ls" sees each service of this server as one.
func (s *Server) announce(subs *subscriptions) error {
	for _, service := range s.services() {
		identity := micro.ServiceIdentity{
			Name: microName(service), ID: s.id, Version: s.cfg.Version, Metadata: map[string]string{},
		}
		for verb, answer := range map[micro.Verb]func() any{
			micro.PingVerb:  func() any { return micro.Ping{ServiceIdentity: identity, Type: micro.PingResponseType} },
			micro.InfoVerb:  func() any { return s.info(identity, service) },
			micro.StatsVerb: func() any { return s.figures(identity, service) },
		} {
			for _, to := range [][2]string{{}, {identity.Name}, {identity.Name, identity.ID}} {
				subject, err := micro.ControlSubject(verb, to[0], to[1])
				if err == nil {
					err = subs.add(s.nc.Subscribe(subject, func(msg *nats.Msg) { s.discovered(msg, answer()) }))
				}
				if err != nil {
					return &postrider.Error{Code: postrider.Unavailable, Op: "rpc: subscribe to discovery of " + service, Err: err}
				}
			}
		}
	}
	return nil
}

// microName turns the name of a service into one of the micro protocol, which allows no dots.
func microName(service string) string { return strings.ReplaceAll(service, ".", "-") }

func (s *Server) services() []string {
	var names []string
	for _, m := range s.methods {
		if !slices.Contains(names, m.service) {
			names = append(names, m.service)
		}
	}
	return names
}

func (s *Server) discovered(msg *nats.Msg, answer any) {
	data, err := json.Marshal(answer)
	if err == nil {
		err = msg.Respond(data)
	}
	if err != nil {
		s.cfg.Logger.Warn("rpc: discovery request not answered", "subject", msg.Subject, "error", err)
	}
}

func (s *Server) info(identity micro.ServiceIdentity, service string) micro.Info {
	info := micro.Info{ServiceIdentity: identity, Type: micro.InfoResponseType, Description: service}
	for _, m := range s.methods {
		if m.service == service {
			info.Endpoints = append(info.Endpoints, micro.EndpointInfo{
				Name: m.name, Subject: m.subject, QueueGroup: s.cfg.Queue, Metadata: map[string]string{},
			})
		}
	}
	return info
}

func (s *Server) figures(identity micro.ServiceIdentity, service string) micro.Stats {
	out := micro.Stats{ServiceIdentity: identity, Type: micro.StatsResponseType, Started: s.started.UTC()}
	for _, m := range s.methods {
		if m.service == service {
			out.Endpoints = append(out.Endpoints, m.stats.endpoint(m, s.cfg.Queue))
		}
	}
	return out
}

func (s *stats) endpoint(m *method, queue string) *micro.EndpointStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := &micro.EndpointStats{
		Name: m.name, Subject: m.subject, QueueGroup: queue,
		NumRequests: s.requests, NumErrors: s.errors, LastError: s.lastError, ProcessingTime: s.time,
	}
	if s.requests > 0 {
		e.AverageProcessingTime = s.time / time.Duration(s.requests)
	}
	return e
}
